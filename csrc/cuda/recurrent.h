// The steps of one direction of sparse_lstm or sparse_gru, after the product of all inputs: what Python calls through
// the C ABI, and what it launches.
#pragma once

#include <stdint.h>

#include "export.h"

enum RecurrentDtype : int { kRecurrentFloat32, kRecurrentFloat16, kRecurrentBFloat16 };

// A kernel for one sequence, and one for up to 8.
enum RecurrentKernel : int { kOneSequence, kFewSequences };

// H hidden units, G gates (4 for an LSTM, 3 for a GRU), B sequences, T steps. All pointers are to device memory.
// H is a multiple of n. T, float16, bfloat16 or float32, is that of `dtype`.
struct RecurrentCuda {
  const void* inputs;  // tokens x G H: W_ih x + b_ih
  const void* bias;    // G H: b_hh, or null
  const int32_t* crow_indices;  // G H / n + 1: W_hh
  const int32_t* col_indices;   // blocks
  const void* values;           // blocks x n x k
  void* h;             // 2 halves of `half` values, H x S of them used: the initial states, S = 1 or 8 by the kernel,
                       // zeros for sequences that are not there. Begins on 16 bytes, as the second half does
  float* c;            // B x H, LSTM only: the initial cells, which become the final ones
  void* y;             // tokens x H, rows y_stride apart
  void* h_n;           // B x H
  float* gates;        // tokens x 4 H, or null: gates after sigmoid and tanh; GRU: reset, update, new, what is reset
  float* cells;        // tokens x H, or null, LSTM only
  const int32_t* table;  // (T + 1) x 2: first token and sequences of each step, in the order they are taken, then zeros
  uint32_t* counter;   // of the blocks that have finished a step; zeroed by the launcher
  int T, B, H, n, k, half, y_stride, dtype;
};

// What a launcher launches, with what only the kernel needs to know.
struct RecurrentLaunch {
  CudaLaunch launch;
  int units;     // hidden units of a block
  int capacity;  // stored columns that a block keeps in shared memory; it reads those beyond at each step
};

// What Python calls of an op.
//
// sparsenlp_<op> launches `kernel` of RecurrentKernel on `stream` of the current device. Returns a code of cudaError_t,
// 0 for success: cudaErrorCooperativeLaunchTooLarge where not all blocks can run at once,
// cudaErrorInvalidConfiguration where no division of the units among blocks fits.
//
// sparsenlp_<op>_plan says what that would launch where there are so many multiprocessors, and so many bytes of shared
// memory for a block; no blocks where it cannot. Needs no GPU. Returns 0 unless there is no such kernel.
#define RECURRENT_OP(op)                                                                                  \
  SPARSENLP_EXPORT int sparsenlp_##op(const RecurrentCuda* arguments, int kernel, void* stream);          \
  SPARSENLP_EXPORT int sparsenlp_##op##_plan(                                                             \
      const RecurrentCuda* arguments, int kernel, int processors, int shared_bytes, RecurrentLaunch* launch);

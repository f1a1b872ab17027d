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

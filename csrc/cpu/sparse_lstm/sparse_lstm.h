// The gates of LSTM cells, forward and backward, for some units of the sequences of one step. Their sums come from
// bsr_linear; E is the dtype of x, float or bfloat16.
#pragma once

#include <stdint.h>

struct SparseLstm {
  static constexpr int kGates = 4;  // input, forget, cell, output: of each, H rows of the weights

  const void* inputs[4];  // E, of each gate: W_ih x + b_ih, M x inputs_stride, from unit `begin` on
  const void* states[4];  // E, of each gate: W_hh h, M x states_stride, likewise
  const void* bias;       // E, 4 H: b_hh, or null
  float* c;               // M x (end - begin): cells before the step, and after it
  void* c_n;              // E, M x H: the cells of the sequences from `ended` on
  void* h;                // E, M x H: hidden state after the step
  void* y;                // E, M x y_stride: the same; null where it is projected first
  void* h_n;              // E, M x H: the same, of the sequences from `ended` on; or null
  float* gates;           // M x 4 H, after sigmoid and tanh, for the backward pass; or null
  float* cells;           // M x H, with gates
  int64_t M, H, inputs_stride, states_stride, y_stride;
  int64_t ended;       // the first of the sequences that take no further step
  int64_t begin, end;  // units
};

// A step of the backward pass. The units [begin, end) of its M sequences.
struct SparseLstmGrad {
  const void* grad_outputs;  // E, M x H: of what leaves the cell
  const float* gates;        // M x 4 H
  const float* cells;        // M x H
  const float* cells_before; // of the first `known` sequences, M x H
  const void* c0;            // E, M x H: of the rest
  float* grad_c;             // M x H: of the cells after the step, then before it
  void* grad_sums;           // E, M x 4 H
  int64_t M, H, known;
  int64_t begin, end;
};

typedef void SparseLstmKernel(const SparseLstm&);
typedef void SparseLstmGradKernel(const SparseLstmGrad&);

// The gates of GRU cells, forward and backward, for some units of the sequences of one step. Their sums come from
// bsr_linear; E is the dtype of x, float or bfloat16.
#pragma once

#include <stdint.h>

struct SparseGru {
  static constexpr int kGates = 3;  // reset, update, new: of each, H rows of the weights

  const void* inputs[3];  // E, of each gate: W_ih x + b_ih, M x inputs_stride, from unit `begin` on
  const void* states[3];  // E, of each gate: W_hh h, M x states_stride, likewise
  const void* bias;       // E, 3 H: b_hh, or null
  void* h;                // E, M x H: hidden state before the step, and after it
  void* y;                // E, M x y_stride: the same
  void* h_n;              // E, M x H: the same, of the sequences from `ended` on
  float* gates;           // M x 4 H: reset, update, new, and what reset multiplies; or null
  int64_t M, H, inputs_stride, states_stride, y_stride;
  int64_t ended;       // the first of the sequences that take no further step
  int64_t begin, end;  // units
};

// A step of the backward pass. The units [begin, end) of its M sequences.
struct SparseGruGrad {
  const void* grad_outputs;  // E, M x H: of the hidden state after the step
  const float* gates;        // M x 4 H
  const void* h_before;      // E, of the first `known` sequences, M x before_stride
  const void* h0;            // E, M x H: of the rest
  void* grad_inputs;         // E, M x 3 H
  void* grad_states;         // E, M x 3 H
  float* grad_h;             // M x H: what reaches the hidden state before the step past the gates
  int64_t M, H, known, before_stride;
  int64_t begin, end;
};

typedef void SparseGruKernel(const SparseGru&);
typedef void SparseGruGradKernel(const SparseGruGrad&);

// y = act(conv(x, W) + b) along sequences, for a block-sparse W.
#pragma once

#include "../encoder_layer/encoder_layer.h"

struct SparseConv1d {
  const void* x;      // B x L x C
  void* y;            // B x P x weight.N
  Projection weight;  // N x (taps * C), the C inputs of the first tap first; int8: C is a multiple of 4. row_sums is not used
  int64_t B, L, P, C;
  int64_t taps, stride, dilation;
  int64_t padding;    // zeros in front of a sequence; as many follow it as P outputs read
  float input_scale;  // int8: x / this is rounded to int8; 0 finds the best scale for each sequence
  int activation;     // enum Activation
  bool half;          // x and y are bfloat16, not float

  // A lane takes a run of outputs, `spacing` apart: what they read of x is then `dilation` apart as taps are, so that it
  // stands in the lane once, and an output reads from `advance` rows further on than the one before.
  int64_t spacing, advance;  // dilation and stride over their greatest common divisor
  int64_t run;               // outputs of a lane
  int T;                     // lanes of a tile, 16 or 32

  int64_t rows() const { return (run - 1) * advance + taps; }  // of x in a lane
  int64_t lanes_of_sequence() const { return spacing * ((P + spacing * run - 1) / (spacing * run)); }
  int64_t lanes() const { return B * lanes_of_sequence(); }
  int64_t tiles() const { return (lanes() + T - 1) / T; }

  // 4-byte words of scratch that one part needs: rows of x, one of them once more before it is rounded, the scales of
  // lanes, and the sums of W's rows.
  size_t scratch() const { return (size_t)(rows() + 1) * C * T + 2 * T + weight.N + 16; }
};

// Computes share `part` of `parts`; the shares are disjoint in what they write. `scratch` is private to the call and
// 64-byte aligned.
typedef void SparseConv1dKernel(const SparseConv1d&, int part, int parts, float* scratch);

// y = act(x Wᵀ + b + residual) for an N:M sparse W: n of every m inputs in a row are kept.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct NmLinear {
  const void* x;          // M x K
  const void* values;     // N x K / m * n, row-major
  const uint8_t* packed;  // N x packed_bytes(), see below
  const void* bias;       // N, or null
  const void* residual;   // M x N, or null
  void* y;                // M x N
  int64_t M, N, K;
  int n, m;
  int activation;  // enum Activation

  // Of each value its position in its group, in value_bits() bits, the first in the lowest; rows padded to
  // whole vectors of 32 values. Any content is safe: positions are cut to the group.
  int value_bits() const { return m <= 4 ? 2 : 4; }
  int64_t row_values() const { return K / m * n; }
  int64_t packed_bytes() const { return (row_values() + 31) / 32 * 4 * value_bits(); }

  bool decode() const { return M <= 8; }
  // 4-byte words of scratch that one part needs: a tile of x, with the pairs of a group expanded for
  // bfloat16, and the sums of kSumRows rows.
  static constexpr int kSumRows = 512;
  size_t scratch() const { return (size_t)(K + 64 + kSumRows) * 128 + 4096; }
};

// The kernel computes share `part` of `parts`; the shares are disjoint in what they write and hold about
// equal work. `scratch` is private to the call and 64-byte aligned.
typedef void NmLinearKernel(const NmLinear&, int part, int parts, float* scratch);

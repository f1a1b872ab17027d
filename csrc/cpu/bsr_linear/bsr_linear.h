// y = act(x Wᵀ + b) for a block-sparse W (BSR), float32, and the gradient of its blocks.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct BsrLinear {
  const float* x;       // M x K
  const int32_t* crow;  // N / n + 1
  const int32_t* col;   // block column of each block
  const float* values;  // blocks of n x k, column-major
  const float* bias;    // N, or null
  float* y;             // M x N
  int64_t M, N, K;
  int n, k;
  int activation;  // enum Activation

  bool decode() const { return M <= 8; }
  // Floats of scratch that one part needs: one tile of x, feature-major, at most 64 tokens wide.
  size_t scratch() const { return decode() ? 0 : (size_t)K * 64 + 1024; }
};

// dvalues[p] = sum over tokens of grad[:, block row of p]ᵀ x[:, block column of p]
struct BsrLinearWgrad {
  const float* grad;  // M x N
  const float* x;     // M x K
  const int32_t* crow;
  const int32_t* col;
  float* dvalues;  // blocks of n x k, column-major
  int64_t M, N, K;
  int n, k;

  size_t scratch() const { return (size_t)K * 64 + 1024; }
};

// Each kernel computes share `part` of `parts`; the shares are disjoint in y and hold about equal work.
// `scratch` is private to the call and 64-byte aligned.
typedef void BsrLinearKernel(const BsrLinear&, int part, int parts, float* scratch);
typedef void BsrLinearWgradKernel(const BsrLinearWgrad&, int part, int parts, float* scratch);

// y = act(x Wᵀ + b + residual) for a block-sparse W (BSR), and its gradients.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct BsrLinear {
  const void* x;         // M x K
  const int32_t* crow;   // N / n + 1
  const int32_t* col;    // block column of each block
  const void* values;    // blocks of n x k, row-major
  const float* scales;   // N: int8 weights times this are the weights; else null
  float input_scale;     // int8: x / this is rounded to int8; 0 finds the best scale for each token
  const void* bias;      // N, or null
  const void* residual;  // M x N, or null; may be y itself
  void* y;               // M x N
  int64_t M, N, K;
  int n, k;
  int activation;  // enum Activation
  bool half;       // int8: x, bias, residual and y are bfloat16, not float
  const BsrLinear* next;  // a matrix of the same x, K, dtype and block that part 0 of 1 also multiplies by, or null

  // 4-byte words of scratch that one part needs: a tile of x, and for int8 the sums of the rows. Matrices linked by
  // `next` need what one would with the rows of all.
  size_t scratch() const { return (size_t)(K + 64) * 72 + N + 4096; }
};

// dx = grad W, and dvalues[p] = sum over tokens of grad[:, block row of p]ᵀ x[:, block column of p].
struct BsrLinearGrad {
  const void* grad;    // M x N
  const void* x;       // M x K, for dvalues
  const void* values;  // blocks of n x k, row-major, for dx
  const int32_t* crow;
  const int32_t* col;
  void* dx;        // M x K
  float* dvalues;  // blocks of n x k, row-major
  int64_t M, N, K;
  int n, k;

  size_t scratch() const { return (size_t)(K + 64) * 64 + (size_t)(n + 64) * 64 + 4096; }
};

// Each kernel computes share `part` of `parts`; the shares are disjoint in what they write and hold about
// equal work. `scratch` is private to the call and 64-byte aligned.
typedef void BsrLinearKernel(const BsrLinear&, int part, int parts, float* scratch);
typedef void BsrLinearGradKernel(const BsrLinearGrad&, int part, int parts, float* scratch);

// For the same block rows again and again. The first call of `pack` finds out how many words they take, 0 if their blocks
// have no packed form; the second one packs them into 64-byte aligned memory. The list should be sorted by length. Then
// `packed` writes the sums of these rows to y, for at most kPackedTokens tokens, without bias, residual and activation.
constexpr int64_t kPackedTokens = 4;
typedef size_t BsrLinearPackKernel(const BsrLinear&, const int32_t* block_rows, int64_t count, float* packed);
typedef void BsrLinearPackedKernel(const BsrLinear&, const float* packed, float* scratch);

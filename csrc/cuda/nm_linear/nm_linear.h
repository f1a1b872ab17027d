// y = act(x Wᵀ + b + residual) for a W in 2:4: what Python calls through the C ABI.
#pragma once

#include <stdint.h>

#include "../export.h"

enum NmDtype : int { kFloat32, kFloat16, kBFloat16, kInt8 };

// A kernel for more than 64 tokens (tiles of 128 x 128), for some (64 rows x 32 tokens), and for at most 8.
enum NmKernel : int { kLarge, kSmall, kFewTokens };

// All pointers are to device memory. W is read as the format NM and `pack_indices` hold it, which is what mma.sp wants:
// nothing is packed for the GPU. K * size of an x is a multiple of 32 bytes; x, values, bias, residual and y begin on
// 16 bytes, packed on 8. bias, residual and y are of dtype y_dtype.
struct NmLinearCuda {
  const void* x;          // M x K, of dtype: float16, bfloat16 or int8
  const void* values;     // N x K / 2, of dtype
  const uint8_t* packed;  // N x ceil(K / 64) * 8: of each value its position in its group, the first in the lowest bits
  const void* bias;       // N, or null
  const void* residual;   // M x N, or null
  const float* x_scales;  // M, int8 only: x[m] stands for x[m] * x_scales[m]
  const float* scales;    // N, int8 only: row n of W for values[n] * scales[n]
  void* y;                // M x N
  int M, N, K;
  int activation;         // enum Activation
  int dtype, y_dtype;     // enum NmDtype; y_dtype is dtype, but for int8 any of the others
};

// Launch on `stream` of the current device. Returns a code of cudaError_t, 0 for success.
SPARSENLP_EXPORT int sparsenlp_nm_linear(const NmLinearCuda* arguments, int kernel, void* stream);

// What that would launch. Needs no GPU.
SPARSENLP_EXPORT int sparsenlp_nm_linear_plan(const NmLinearCuda* arguments, int kernel, CudaLaunch* launch);

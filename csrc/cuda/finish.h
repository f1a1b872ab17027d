// What a linear layer does with its sums: bias, residual, activation, rounding to the output type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cpu/activation.h"

namespace {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

// NaN stays NaN.
__device__ __forceinline__ float activate(float v, int activation) {
  if (activation == kRelu) return v < 0.0f ? 0.0f : v;
  if (activation == kGelu) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
  if (activation == kGeluTanh) return __fdividef(v, 1.0f + __expf(-1.59576912f * (v + 0.044715f * v * v * v)));
  return v;
}

}  // namespace

// nm_linear: the kernels' names, which of them runs, and its launch.
#include "nm_linear.h"

// What every kernel takes; NmLinearCuda says what it is.
#define NM_LINEAR_PARAMETERS(T, Out)                                                                         \
  const T *__restrict__ x, const T *__restrict__ values, const uint8_t *__restrict__ packed,                 \
      const Out *__restrict__ bias, const Out *__restrict__ residual, const float *__restrict__ x_scales,    \
      const float *__restrict__ scales, Out *__restrict__ y, int M, int N, int K, int activation

#include "few_tokens.h"
#include "many_tokens.h"

#define KERNELS(name, T, Out)                                                                                \
  extern "C" __global__ void __launch_bounds__(LargeTile::kThreads)                                          \
      nm_linear_large_##name(NM_LINEAR_PARAMETERS(T, Out)) {                                                 \
    many_tokens<T, Out, LargeTile>(x, values, packed, bias, residual, x_scales, scales, y, M, N, K, activation); \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(SmallTile::kThreads)                                          \
      nm_linear_small_##name(NM_LINEAR_PARAMETERS(T, Out)) {                                                 \
    many_tokens<T, Out, SmallTile>(x, values, packed, bias, residual, x_scales, scales, y, M, N, K, activation); \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(kFewThreads)                                                  \
      nm_linear_few_##name(NM_LINEAR_PARAMETERS(T, Out)) {                                                   \
    few_tokens<T, Out>(x, values, packed, bias, residual, x_scales, scales, y, M, N, K, activation);         \
  }
#include "nm_linear.inc"
#undef KERNELS

namespace {

template <class T>
struct Dtype;
template <> struct Dtype<float> { static constexpr int code = kFloat32; };
template <> struct Dtype<__half> { static constexpr int code = kFloat16; };
template <> struct Dtype<__nv_bfloat16> { static constexpr int code = kBFloat16; };
template <> struct Dtype<int8_t> { static constexpr int code = kInt8; };

struct Launch {
  int64_t blocks;
  int threads, shared;
};

template <class T, class Tile>
Launch tiled(const NmLinearCuda& a) {
  const int64_t row_tiles = (a.N + Tile::kRows - 1) / Tile::kRows, token_tiles = (a.M + Tile::kTokens - 1) / Tile::kTokens;
  return {row_tiles * token_tiles, Tile::kThreads, shared_bytes<T, Tile>()};
}

template <class T, class Out>
cudaError_t run(void (*kernel)(NM_LINEAR_PARAMETERS(T, Out)), const Launch& launch, const NmLinearCuda& a, cudaStream_t stream) {
  if (launch.blocks < 1 || launch.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(launch.blocks), launch.threads, launch.shared, stream>>>(
      static_cast<const T*>(a.x), static_cast<const T*>(a.values), a.packed, static_cast<const Out*>(a.bias),
      static_cast<const Out*>(a.residual), a.x_scales, a.scales, static_cast<Out*>(a.y), a.M, a.N, a.K, a.activation);
  return cudaGetLastError();
}

}  // namespace

int sparsenlp_nm_linear(const NmLinearCuda* arguments, int kernel, void* stream_any) {
  const NmLinearCuda& a = *arguments;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_any);
  const Launch few{(a.N + kFewRows - 1) / kFewRows, kFewThreads, 0};
  if (kernel == kFewTokens && a.M > kMostFewTokens) return cudaErrorInvalidValue;
#define KERNELS(name, T, Out)                                                                    \
  if (a.dtype == Dtype<T>::code && a.y_dtype == Dtype<Out>::code) {                              \
    if (kernel == kLarge) return run(nm_linear_large_##name, tiled<T, LargeTile>(a), a, stream); \
    if (kernel == kSmall) return run(nm_linear_small_##name, tiled<T, SmallTile>(a), a, stream); \
    if (kernel == kFewTokens) return run(nm_linear_few_##name, few, a, stream);                  \
  }
#include "nm_linear.inc"
#undef KERNELS
  return cudaErrorInvalidValue;
}

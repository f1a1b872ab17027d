// nm_linear: the kernels' names, which of them runs, and its launch.
#include "nm_linear.h"

// What every kernel takes; NmLinearCuda says what it is.
#define NM_LINEAR_PARAMETERS(T, Out)                                                                      \
  const T *__restrict__ x, const T *__restrict__ values, const uint8_t *__restrict__ packed,              \
      const Out *__restrict__ bias, const Out *__restrict__ residual, const float *__restrict__ x_scales, \
      const float *__restrict__ scales, Out *__restrict__ y, int M, int N, int K, int activation
#define NM_LINEAR_NAMES x, values, packed, bias, residual, x_scales, scales, y, M, N, K, activation

#include "few_tokens.h"
#include "many_tokens.h"

#define KERNEL(name, T, Out, threads, ...)                                                    \
  extern "C" __global__ void __launch_bounds__(threads) name(NM_LINEAR_PARAMETERS(T, Out)) {  \
    __VA_ARGS__(NM_LINEAR_NAMES);                                                             \
  }
#define KERNELS(name, T, Out)                                                                 \
  KERNEL(nm_linear_large_##name, T, Out, LargeTile::kThreads, many_tokens<T, Out, LargeTile>) \
  KERNEL(nm_linear_small_##name, T, Out, SmallTile::kThreads, many_tokens<T, Out, SmallTile>) \
  KERNEL(nm_linear_few_##name, T, Out, kFewThreads, few_tokens<T, Out>)
#include "nm_linear.inc"
#undef KERNELS
#undef KERNEL

namespace {

template <class T>
struct Dtype;
template <> struct Dtype<float> { static constexpr int code = kFloat32; };
template <> struct Dtype<__half> { static constexpr int code = kFloat16; };
template <> struct Dtype<__nv_bfloat16> { static constexpr int code = kBFloat16; };
template <> struct Dtype<int8_t> { static constexpr int code = kInt8; };

template <class T, class Tile>
CudaLaunch tiled(const char* kernel, const NmLinearCuda& a) {
  const int64_t row_tiles = (a.N + Tile::kRows - 1) / Tile::kRows;
  const int64_t token_tiles = (a.M + Tile::kTokens - 1) / Tile::kTokens;
  return {kernel, row_tiles * token_tiles, Tile::kThreads, shared_bytes<T, Tile>()};
}

CudaLaunch few(const char* kernel, const NmLinearCuda& a) {
  return {kernel, a.M <= kMostFewTokens ? (a.N + kFewRows - 1) / kFewRows : 0, kFewThreads, 0};
}

// Launch, or where `plan` is not null only tell.
template <class T, class Out>
cudaError_t run(
    void (*kernel)(NM_LINEAR_PARAMETERS(T, Out)), const CudaLaunch& launch, const NmLinearCuda& a, cudaStream_t stream,
    CudaLaunch* plan) {
  if (launch.blocks < 1 || launch.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (plan != nullptr) {
    *plan = launch;
    return cudaSuccess;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(launch.blocks), launch.threads, launch.shared_bytes, stream>>>(
      static_cast<const T*>(a.x), static_cast<const T*>(a.values), a.packed, static_cast<const Out*>(a.bias),
      static_cast<const Out*>(a.residual), a.x_scales, a.scales, static_cast<Out*>(a.y), a.M, a.N, a.K, a.activation);
  return cudaGetLastError();
}

cudaError_t dispatch(const NmLinearCuda& a, int kernel, cudaStream_t stream, CudaLaunch* plan) {
#define KERNEL(name, T, Out, launch) return run<T, Out>(name, launch(#name, a), a, stream, plan)
#define KERNELS(name, T, Out)                                                               \
  if (a.dtype == Dtype<T>::code && a.y_dtype == Dtype<Out>::code) {                         \
    if (kernel == kLarge) KERNEL(nm_linear_large_##name, T, Out, (tiled<T, LargeTile>));    \
    if (kernel == kSmall) KERNEL(nm_linear_small_##name, T, Out, (tiled<T, SmallTile>));    \
    if (kernel == kFewTokens) KERNEL(nm_linear_few_##name, T, Out, few);                    \
  }
#include "nm_linear.inc"
#undef KERNELS
#undef KERNEL
  return cudaErrorInvalidValue;
}

}  // namespace

int sparsenlp_nm_linear(const NmLinearCuda* arguments, int kernel, void* stream) {
  return dispatch(*arguments, kernel, static_cast<cudaStream_t>(stream), nullptr);
}

int sparsenlp_nm_linear_plan(const NmLinearCuda* arguments, int kernel, CudaLaunch* launch) {
  return dispatch(*arguments, kernel, nullptr, launch);
}

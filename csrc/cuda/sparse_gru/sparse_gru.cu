// sparse_gru: the kernels' names, and which of them runs.
#include "sparse_gru.h"

#include "../persistent.h"

namespace {
constexpr int kGates = 3;
}

#define KERNEL(name, T, sequences) PERSISTENT_KERNEL(name, T, kGates, sequences)
#include "sparse_gru.inc"
#undef KERNEL

int sparsenlp_sparse_gru(const RecurrentCuda* arguments, int kernel, void* stream) {
#define KERNEL(name, T, sequences)                                                \
  if (arguments->dtype == kRecurrentDtype<T> && kernel == kernel_for(sequences)) \
    return run_persistent<T, kGates, sequences>(name, #name, *arguments, static_cast<cudaStream_t>(stream));
#include "sparse_gru.inc"
#undef KERNEL
  return cudaErrorInvalidValue;
}

int sparsenlp_sparse_gru_plan(
    const RecurrentCuda* arguments, int kernel, int processors, int shared_bytes, RecurrentLaunch* launch) {
#define KERNEL(name, T, sequences)                                                                     \
  if (arguments->dtype == kRecurrentDtype<T> && kernel == kernel_for(sequences)) {                     \
    *launch = plan_persistent<T, kGates, sequences>(#name, *arguments, processors, shared_bytes);      \
    return cudaSuccess;                                                                                \
  }
#include "sparse_gru.inc"
#undef KERNEL
  return cudaErrorInvalidValue;
}

// sparse_lstm: the kernels' names, and which of them runs.
#include "sparse_lstm.h"

#include "../persistent.h"

namespace {
constexpr int kGates = 4;
}

#define KERNEL(name, T, sequences) PERSISTENT_KERNEL(name, T, kGates, sequences)
#include "sparse_lstm.inc"
#undef KERNEL

int sparsenlp_sparse_lstm(const RecurrentCuda* arguments, int kernel, void* stream) {
#define KERNEL(name, T, sequences)                                                \
  if (arguments->dtype == kRecurrentDtype<T> && kernel == kernel_for(sequences)) \
    return run_persistent<T, kGates, sequences>(name, #name, *arguments, static_cast<cudaStream_t>(stream));
#include "sparse_lstm.inc"
#undef KERNEL
  return cudaErrorInvalidValue;
}

int sparsenlp_sparse_lstm_plan(
    const RecurrentCuda* arguments, int kernel, int processors, int shared_bytes, RecurrentLaunch* launch) {
#define KERNEL(name, T, sequences)                                                                     \
  if (arguments->dtype == kRecurrentDtype<T> && kernel == kernel_for(sequences)) {                     \
    *launch = plan_persistent<T, kGates, sequences>(#name, *arguments, processors, shared_bytes);      \
    return cudaSuccess;                                                                                \
  }
#include "sparse_lstm.inc"
#undef KERNEL
  return cudaErrorInvalidValue;
}

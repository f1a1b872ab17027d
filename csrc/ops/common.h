// What the torch side of every op shares: allocation, threads, choosing a kernel. Only files in this folder
// include torch's headers, and of those only the stable ABI, so that one binary serves torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/activation.h"
#include "../cpu/isa.h"
#include "checks.h"

// |x| and |w| are at most 127, and x shifted by 128 at most 255: a row of this many stored weights cannot
// overflow 32 bits, since 255 * 127 * 66311 < 2^31.
constexpr int64_t kInt8Columns = 66311;

// A kernel and the instruction set it needs; lists are best first and end with one that always runs.
template <class Kernel>
struct Listed {
  int isa;
  Kernel* run;
};

template <class Kernel, size_t count>
Kernel* best_kernel(const Listed<Kernel> (&list)[count]) {
  const Listed<Kernel>* best = list;
  while (best->isa > isa_in_use() || !isa_supported(best->isa)) best++;
  return best->run;
}

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // 64-byte aligned memory, kept for the thread's next call.
  float* at_least(size_t words) {
    if (words > size_) {
      std::free(data_);
      data_ = static_cast<float*>(std::aligned_alloc(64, (words * sizeof(float) + 63) / 64 * 64));
      size_ = data_ ? words : 0;
      STD_TORCH_CHECK(data_, "sparsenlp: out of memory for ", words, " words of scratch");
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// Working memory, laid out as it is asked for; a first pass without memory finds the size.
class Layout {
 public:
  explicit Layout(float* data) : data_(data) {}
  // `words` 4-byte words, 64-byte aligned.
  float* take(size_t words) {
    float* taken = data_ ? data_ + used_ : nullptr;
    used_ += (words + 15) / 16 * 16;
    return taken;
  }
  size_t used() const { return used_; }

 private:
  float* data_;
  size_t used_ = 0;
};

// Whether this process was forked from one that may have started its thread pool: the pool's threads are
// gone, and waiting for them would never end.
inline bool was_forked() {
  static std::atomic<bool> forked{false};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)registered;
  return forked;
}

// Run every share of the work, one thread each, or all of them here inside somebody's parallel region and in
// a forked process. `work` is in multiply-adds.
template <class Kernel, class Args>
void run_parts(Kernel kernel, const Args& args, int64_t work) {
  constexpr int64_t kWorkPerThread = 1 << 15;  // below which a second thread costs more than it saves
  int64_t parts = torch::stable::get_num_threads();
  if (work / kWorkPerThread < parts) parts = work / kWorkPerThread;
  if (was_forked()) parts = 1;
  auto shares = [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = scratch.at_least(args.scratch());
    for (int64_t part = begin; part < end; part++)
      kernel(args, static_cast<int>(part), static_cast<int>(parts < 1 ? 1 : parts), memory);
  };
  if (parts <= 1) return shares(0, 1);
  torch::stable::parallel_for(0, parts, 1, shares);
}

// Of one element of a LayerNorm, in multiply-adds.
constexpr int64_t kNormWork = 8;

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Of float32, bfloat16 or int32.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  product("sparsenlp", sizes);
  for (size_t i = sizes.size(); i-- > 0; stride = work_of(stride, sizes[i] > 0 ? sizes[i] : 1)) strides[i] = stride;
  const int32_t code = dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Int    ? aoti_torch_dtype_int32()
                                                     : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); i++) sizes[i] = t.size(i);
  return sizes;
}

inline int activation_of(const char* op, const std::string& name) {
  const int code = activation_code(name.c_str());
  STD_TORCH_CHECK(code >= 0, op, ": unknown activation ", name);
  return code;
}

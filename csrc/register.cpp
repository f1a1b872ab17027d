// The torch side of the ops: checks, allocation, threads. The only file that includes torch's headers,
// and of those only the stable ABI, so that one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cpu/activation.h"
#include "cpu/bsr_linear/bsr_linear.h"
#include "cpu/isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define KERNEL(isa, suffix)            \
  BsrLinearKernel bsr_linear_##suffix; \
  BsrLinearWgradKernel bsr_linear_wgrad_##suffix;
#include "cpu/bsr_linear/bsr_linear.inc"
#undef KERNEL

namespace {

struct BsrLinearKernels {
  int isa;
  BsrLinearKernel* forward;
  BsrLinearWgradKernel* wgrad;
};

const BsrLinearKernels& kernels() {
  static const BsrLinearKernels list[] = {
#define KERNEL(isa, suffix) {isa, bsr_linear_##suffix, bsr_linear_wgrad_##suffix},
#include "cpu/bsr_linear/bsr_linear.inc"
#undef KERNEL
  };
  const BsrLinearKernels* best = list;
  while (best->isa > isa_in_use()) best++;
  return *best;
}

struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  float* at_least(size_t floats) {
    if (floats > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
      size = data ? floats : 0;
      STD_TORCH_CHECK(data, "sparsenlp: out of memory for ", floats, " floats of scratch");
    }
    return data;
  }
};

// Run every share of the work, one thread each, or all of them here inside somebody's parallel region.
template <class Kernel, class Args>
void run(Kernel* kernel, const Args& args, int64_t work) {
  constexpr int64_t kWorkPerThread = 1 << 15;  // multiply-adds below which a second thread costs more than it saves
  int64_t parts = torch::stable::get_num_threads();
  if (work / kWorkPerThread < parts) parts = work / kWorkPerThread;
  auto shares = [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = scratch.at_least(args.scratch());
    for (int64_t part = begin; part < end; part++)
      kernel(args, static_cast<int>(part), static_cast<int>(parts < 1 ? 1 : parts), memory);
  };
  if (parts <= 1) return shares(0, 1);
  torch::stable::parallel_for(0, parts, 1, shares);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor empty_float(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "bsr_linear: expected ", name, " of dtype float32");
}

// Blocks column-major: strides (n * k, 1, n), where a side of length 1 leaves its stride free.
bool is_packed(const Tensor& values) {
  const int64_t n = values.size(1), k = values.size(2);
  return (values.stride(0) == n * k || values.size(0) <= 1) && (values.stride(1) == 1 || n == 1) &&
         (values.stride(2) == n || k == 1);
}

Tensor packed(const Tensor& values) {
  if (is_packed(values)) return values;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(values, 1, 2)), 1, 2);
}

void check_pattern(const Tensor& crow, const Tensor& col, int64_t blocks, int64_t K, int64_t k) {
  STD_TORCH_CHECK(
      crow.scalar_type() == ScalarType::Int && col.scalar_type() == ScalarType::Int && crow.dim() == 1 &&
          col.dim() == 1 && crow.is_contiguous() && col.is_contiguous(),
      "bsr_linear: expected contiguous 1-D int32 crow_indices and col_indices");
  STD_TORCH_CHECK(crow.size(0) >= 1 && col.size(0) == blocks && ints(crow)[crow.size(0) - 1] == blocks,
                  "bsr_linear: crow_indices, col_indices and values disagree on the number of blocks");
  STD_TORCH_CHECK(K % k == 0, "bsr_linear: expected K to be a multiple of ", k, ", got ", K);
}

Tensor bsr_linear(
    const Tensor& x_any, const Tensor& crow, const Tensor& col, const Tensor& values_any,
    const std::optional<Tensor>& bias_any, const std::string& activation) {
  check_float(x_any, "x");
  check_float(values_any, "values");
  STD_TORCH_CHECK(x_any.dim() >= 1 && values_any.dim() == 3, "bsr_linear: expected x (..., K) and values (nnzb, n, k)");
  const Tensor x = as_contiguous(x_any), values = packed(values_any);
  std::optional<Tensor> bias;
  std::vector<int64_t> sizes(x.dim());
  BsrLinear a{};
  a.M = 1;
  for (int64_t i = 0; i < x.dim(); i++) sizes[i] = x.size(i);
  for (int64_t i = 0; i + 1 < x.dim(); i++) a.M *= sizes[i];
  a.n = static_cast<int>(values.size(1));
  a.k = static_cast<int>(values.size(2));
  a.N = (crow.size(0) - 1) * a.n;
  a.K = sizes.back();
  check_pattern(crow, col, values.size(0), a.K, a.k);
  if (bias_any) {
    check_float(*bias_any, "bias");
    STD_TORCH_CHECK(bias_any->dim() == 1 && bias_any->size(0) == a.N, "bsr_linear: expected bias of shape (", a.N, ")");
    bias = as_contiguous(*bias_any);
    a.bias = floats(*bias);
  }
  sizes.back() = a.N;
  Tensor y = empty_float(sizes);
  a.x = floats(x);
  a.crow = ints(crow);
  a.col = ints(col);
  a.values = floats(values);
  a.y = static_cast<float*>(y.data_ptr());
  a.activation = activation_code(activation.c_str());
  STD_TORCH_CHECK(a.activation >= 0, "bsr_linear: unknown activation ", activation);
  if (a.M == 0 || a.N == 0) return y;
  run(kernels().forward, a, a.M * (values.size(0) * a.n * a.k + a.N));
  return y;
}

Tensor bsr_linear_wgrad(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& crow, const Tensor& col, std::vector<int64_t> block) {
  check_float(grad_any, "grad");
  check_float(x_any, "x");
  STD_TORCH_CHECK(block.size() == 2 && block[0] > 0 && block[1] > 0, "bsr_linear_wgrad: expected a block of two sides");
  const Tensor grad = as_contiguous(grad_any), x = as_contiguous(x_any);
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0),
                  "bsr_linear_wgrad: expected grad (M, N) and x (M, K)");
  BsrLinearWgrad a{};
  a.M = x.size(0);
  a.n = static_cast<int>(block[0]);
  a.k = static_cast<int>(block[1]);
  a.N = (crow.size(0) - 1) * a.n;
  a.K = x.size(1);
  STD_TORCH_CHECK(grad.size(1) == a.N, "bsr_linear_wgrad: expected grad with N = ", a.N, " columns");
  check_pattern(crow, col, col.size(0), a.K, a.k);
  Tensor dvalues = empty_float({col.size(0), block[1], block[0]});
  a.grad = floats(grad);
  a.x = floats(x);
  a.crow = ints(crow);
  a.col = ints(col);
  a.dvalues = static_cast<float*>(dvalues.data_ptr());
  run(kernels().wgrad, a, a.M * col.size(0) * a.n * a.k);
  return torch::stable::transpose(dvalues, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_wgrad", TORCH_BOX(&bsr_linear_wgrad));
}

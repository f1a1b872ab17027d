// nm_linear: checks and allocation.
#include "../cpu/nm_linear/nm_linear.h"

#include "common.h"

#define FORWARD(isa, dtype, suffix) NmLinearKernel nm_linear_##dtype##_##suffix;
#include "../cpu/nm_linear/nm_linear.inc"

namespace {

enum Dtype { f32, bf16 };

template <Dtype dtype>
NmLinearKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, nm_linear_##type##_##suffix},
  static const Listed<NmLinearKernel> list[] = {
#include "../cpu/nm_linear/nm_linear.inc"
  };
  return best_kernel(list);
}

Tensor nm_linear(
    const Tensor& x_any, const Tensor& values_any, const Tensor& indices, const Tensor& packed_any,
    std::vector<int64_t> pattern, const std::optional<Tensor>& bias_any, const std::string& activation,
    const std::optional<Tensor>& residual_any, const std::optional<Tensor>& scales, double) {
  STD_TORCH_CHECK(!scales, "nm_linear: expected no scales, int8 weights have no kernel on a CPU");
  STD_TORCH_CHECK(x_any.scalar_type() == ScalarType::Float || x_any.scalar_type() == ScalarType::BFloat16,
                  "nm_linear: expected x of dtype float32 or bfloat16");
  STD_TORCH_CHECK(values_any.scalar_type() == x_any.scalar_type(), "nm_linear: expected values of the dtype of x");
  STD_TORCH_CHECK(x_any.dim() >= 1 && values_any.dim() == 2, "nm_linear: expected x (..., K) and values (N, K / m * n)");
  NmLinear a{};
  const auto is = [&](int64_t n, int64_t m) { return pattern == std::vector<int64_t>{n, m}; };
  STD_TORCH_CHECK(is(2, 4) || is(1, 4) || is(4, 8), "nm_linear: expected a pattern among 2:4, 1:4 and 4:8");
  a.n = static_cast<int>(pattern[0]);
  a.m = static_cast<int>(pattern[1]);
  const Tensor x = as_contiguous(x_any), values = as_contiguous(values_any), packed = as_contiguous(packed_any);
  std::vector<int64_t> sizes = sizes_of(x);
  a.M = rows_of("nm_linear", sizes);
  a.N = checked_size("nm_linear", "N", values.size(0));
  a.K = checked_size("nm_linear", "K", sizes.back());
  STD_TORCH_CHECK(a.K % a.m == 0 && values.size(1) == a.row_values(),
                  "nm_linear: expected values with K / m * n = ", a.row_values(), " columns, got ", values.size(1));
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && sizes_of(packed) == std::vector<int64_t>({a.N, a.packed_bytes()}),
                  "nm_linear: expected packed of dtype uint8 and shape (", a.N, ", ", a.packed_bytes(), ")");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Byte && sizes_of(indices) == sizes_of(values),
                  "nm_linear: expected indices of dtype uint8 and the shape of values");
  std::optional<Tensor> bias, residual;
  if (bias_any) {
    STD_TORCH_CHECK(bias_any->scalar_type() == x.scalar_type(), "nm_linear: expected bias of the dtype of x");
    STD_TORCH_CHECK(bias_any->dim() == 1 && bias_any->size(0) == a.N, "nm_linear: expected bias of shape (", a.N, ")");
    bias = as_contiguous(*bias_any);
    a.bias = bias->data_ptr();
  }
  sizes.back() = a.N;
  if (residual_any) {
    STD_TORCH_CHECK(residual_any->scalar_type() == x.scalar_type(), "nm_linear: expected residual of the dtype of x");
    STD_TORCH_CHECK(sizes_of(*residual_any) == sizes, "nm_linear: expected residual of the shape of y");
    residual = as_contiguous(*residual_any);
    a.residual = residual->data_ptr();
  }
  a.activation = activation_of("nm_linear", activation);
  Tensor y = empty(sizes, x.scalar_type());
  a.x = x.data_ptr();
  a.values = values.data_ptr();
  a.packed = static_cast<const uint8_t*>(packed.data_ptr());
  a.y = y.data_ptr();
  if (a.M == 0 || a.N == 0) return y;
  NmLinearKernel* kernel = x.scalar_type() == ScalarType::BFloat16 ? forward_kernel<bf16>() : forward_kernel<f32>();
  run_parts(kernel, a, work_of(a.M, a.N * (a.row_values() + 1)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("nm_linear", TORCH_BOX(&nm_linear)); }

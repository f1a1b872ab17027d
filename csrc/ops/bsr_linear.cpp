// bsr_linear and its gradients: checks and allocation.
#include "../cpu/bsr_linear/bsr_linear.h"

#include "common.h"

#define FORWARD(isa, dtype, suffix) BsrLinearKernel bsr_linear_##dtype##_##suffix;
#define GRAD(isa, dtype, suffix) BsrLinearGradKernel bsr_linear_dgrad_##dtype##_##suffix, bsr_linear_wgrad_##dtype##_##suffix;
#include "../cpu/bsr_linear/bsr_linear.inc"

namespace {

enum Dtype { f32, bf16, i8 };

template <Dtype dtype>
BsrLinearKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) \
  {type == dtype ? isa : kIsaCount, bsr_linear_##type##_##suffix},
  static const Listed<BsrLinearKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

template <Dtype dtype>
BsrLinearGradKernel* dgrad_kernel() {
#define GRAD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_dgrad_##type##_##suffix},
  static const Listed<BsrLinearGradKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

template <Dtype dtype>
BsrLinearGradKernel* wgrad_kernel() {
#define GRAD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_wgrad_##type##_##suffix},
  static const Listed<BsrLinearGradKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

void check_io(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "bsr_linear: expected ", name, " of the dtype of x");
}

bool is_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16;
}

// y is given, or allocated here; it starts from `residual` where there is one.
Tensor forward(
    const Tensor& x_any, const Tensor& crow, const Tensor& col, const Tensor& values_any,
    const std::optional<Tensor>& bias_any, const std::string& activation, const std::optional<Tensor>& residual_any,
    const std::optional<Tensor>& scales_any, double input_scale, const Tensor* in_place) {
  STD_TORCH_CHECK(x_any.dim() >= 1 && values_any.dim() == 3, "bsr_linear: expected x (..., K) and values (nnzb, n, k)");
  STD_TORCH_CHECK(is_float(x_any), "bsr_linear: expected x of dtype float32 or bfloat16");
  const bool quantized = values_any.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(quantized || values_any.scalar_type() == x_any.scalar_type(),
                  "bsr_linear: expected values of the dtype of x, or int8");
  const Tensor x = as_contiguous(x_any), values = as_contiguous(values_any);
  std::optional<Tensor> bias, residual, scales;
  std::vector<int64_t> sizes = sizes_of(x);
  BsrLinear a{};
  a.M = rows_of("bsr_linear", sizes);
  a.n = checked_side("bsr_linear", values.size(1));
  a.k = checked_side("bsr_linear", values.size(2));
  a.K = sizes.back();
  a.N = check_pattern("bsr_linear", crow, col, values.size(0), a.n, a.k, a.K);
  a.half = x.scalar_type() == ScalarType::BFloat16;
  if (bias_any) {
    check_io(*bias_any, x.scalar_type(), "bias");
    STD_TORCH_CHECK(bias_any->dim() == 1 && bias_any->size(0) == a.N, "bsr_linear: expected bias of shape (", a.N, ")");
    bias = as_contiguous(*bias_any);
    a.bias = bias->data_ptr();
  }
  STD_TORCH_CHECK(quantized == scales_any.has_value(), "bsr_linear: expected scales with int8 values, and only then");
  if (quantized) {
    STD_TORCH_CHECK(a.k % 4 == 0, "bsr_linear: expected int8 blocks with k a multiple of 4, got ", a.k);
    STD_TORCH_CHECK(a.K <= kInt8Columns, "bsr_linear: expected at most ", kInt8Columns, " columns of int8, got ", a.K);
    STD_TORCH_CHECK(scales_any->scalar_type() == ScalarType::Float && scales_any->dim() == 1 && scales_any->size(0) == a.N,
                    "bsr_linear: expected float32 scales of shape (", a.N, ")");
    STD_TORCH_CHECK(input_scale >= 0 && input_scale < 1e30, "bsr_linear: expected a finite input_scale of at least 0");
    scales = as_contiguous(*scales_any);
    a.scales = static_cast<const float*>(scales->data_ptr());
    a.input_scale = static_cast<float>(input_scale);
  }
  sizes.back() = a.N;
  const auto fits = [&](const Tensor& t) { return sizes_of(t) == sizes; };
  if (residual_any) {
    check_io(*residual_any, x.scalar_type(), "residual");
    STD_TORCH_CHECK(fits(*residual_any), "bsr_linear: expected residual of the shape of y");
    residual = as_contiguous(*residual_any);
    a.residual = residual->data_ptr();
  }
  if (in_place) {
    check_io(*in_place, x.scalar_type(), "y");
    STD_TORCH_CHECK(fits(*in_place) && in_place->is_contiguous(), "bsr_linear_add_: expected a contiguous y (..., N)");
    a.residual = in_place->data_ptr();
  }
  Tensor y = in_place ? *in_place : empty(sizes, x.scalar_type());
  a.x = x.data_ptr();
  a.crow = ints(crow);
  a.col = ints(col);
  a.values = values.data_ptr();
  a.y = y.data_ptr();
  a.activation = activation_of("bsr_linear", activation);
  if (a.M == 0 || a.N == 0) return y;
  BsrLinearKernel* kernel = quantized ? forward_kernel<i8>() : a.half ? forward_kernel<bf16>() : forward_kernel<f32>();
  run_parts(kernel, a, work_of(a.M, values.size(0) * a.n * a.k + a.N));
  return y;
}

Tensor bsr_linear(
    const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& values, const std::optional<Tensor>& bias,
    const std::string& activation, const std::optional<Tensor>& residual, const std::optional<Tensor>& scales,
    double input_scale) {
  return forward(x, crow, col, values, bias, activation, residual, scales, input_scale, nullptr);
}

void bsr_linear_add_(
    const Tensor& y, const Tensor& x, const Tensor& crow, const Tensor& col, const Tensor& values,
    const std::optional<Tensor>& bias, const std::string& activation, const std::optional<Tensor>& scales,
    double input_scale) {
  forward(x, crow, col, values, bias, activation, std::nullopt, scales, input_scale, &y);
}

Tensor bsr_linear_dgrad(
    const Tensor& grad_any, const Tensor& crow, const Tensor& col, const Tensor& values_any, int64_t columns) {
  STD_TORCH_CHECK(is_float(grad_any) && grad_any.scalar_type() == values_any.scalar_type(),
                  "bsr_linear_dgrad: expected grad and values, both float32 or both bfloat16");
  STD_TORCH_CHECK(grad_any.dim() == 2 && values_any.dim() == 3, "bsr_linear_dgrad: expected grad (M, N), values (nnzb, n, k)");
  const Tensor grad = as_contiguous(grad_any), values = as_contiguous(values_any);
  BsrLinearGrad a{};
  a.M = grad.size(0);
  a.n = checked_side("bsr_linear_dgrad", values.size(1));
  a.k = checked_side("bsr_linear_dgrad", values.size(2));
  a.K = columns;
  a.N = check_pattern("bsr_linear_dgrad", crow, col, values.size(0), a.n, a.k, a.K);
  STD_TORCH_CHECK(grad.size(1) == a.N, "bsr_linear_dgrad: expected grad with N = ", a.N, " columns");
  Tensor dx = empty({a.M, a.K}, grad.scalar_type());
  a.grad = grad.data_ptr();
  a.crow = ints(crow);
  a.col = ints(col);
  a.values = values.data_ptr();
  a.dx = dx.data_ptr();
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  run_parts(half ? dgrad_kernel<bf16>() : dgrad_kernel<f32>(), a, work_of(a.M, values.size(0) * a.n * a.k));
  return dx;
}

Tensor bsr_linear_wgrad(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& crow, const Tensor& col, std::vector<int64_t> block) {
  STD_TORCH_CHECK(is_float(grad_any) && grad_any.scalar_type() == x_any.scalar_type(),
                  "bsr_linear_wgrad: expected grad and x, both float32 or both bfloat16");
  STD_TORCH_CHECK(block.size() == 2, "bsr_linear_wgrad: expected a block of two sides");
  const Tensor grad = as_contiguous(grad_any), x = as_contiguous(x_any);
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0),
                  "bsr_linear_wgrad: expected grad (M, N) and x (M, K)");
  BsrLinearGrad a{};
  a.M = x.size(0);
  a.n = checked_side("bsr_linear_wgrad", block[0]);
  a.k = checked_side("bsr_linear_wgrad", block[1]);
  a.K = x.size(1);
  a.N = check_pattern("bsr_linear_wgrad", crow, col, col.dim() == 1 ? col.size(0) : 0, a.n, a.k, a.K);
  STD_TORCH_CHECK(grad.size(1) == a.N, "bsr_linear_wgrad: expected grad with N = ", a.N, " columns");
  Tensor dvalues = empty({col.size(0), block[0], block[1]}, ScalarType::Float);
  a.grad = grad.data_ptr();
  a.x = x.data_ptr();
  a.crow = ints(crow);
  a.col = ints(col);
  a.dvalues = static_cast<float*>(dvalues.data_ptr());
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  run_parts(half ? wgrad_kernel<bf16>() : wgrad_kernel<f32>(), a, work_of(a.M, col.size(0) * a.n * a.k));
  return dvalues;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_add_", TORCH_BOX(&bsr_linear_add_));
  m.impl("bsr_linear_dgrad", TORCH_BOX(&bsr_linear_dgrad));
  m.impl("bsr_linear_wgrad", TORCH_BOX(&bsr_linear_wgrad));
}

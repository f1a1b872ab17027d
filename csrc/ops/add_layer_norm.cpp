// add_layer_norm: checks and allocation.
#include "../cpu/add_layer_norm/add_layer_norm.h"

#include "common.h"

#define FORWARD(isa, dtype, suffix) AddLayerNormKernel add_layer_norm_##dtype##_##suffix;
#include "../cpu/add_layer_norm/add_layer_norm.inc"

namespace {

enum Dtype { f32, bf16 };

template <Dtype dtype>
AddLayerNormKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, add_layer_norm_##type##_##suffix},
  static const Listed<AddLayerNormKernel> list[] = {
#include "../cpu/add_layer_norm/add_layer_norm.inc"
  };
  return best_kernel(list);
}

Tensor add_layer_norm(
    const Tensor& x_any, const std::optional<Tensor>& residual_any, const Tensor& weight_any,
    const std::optional<Tensor>& bias_any, double eps) {
  const ScalarType dtype = x_any.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "add_layer_norm: expected x of dtype float32 or bfloat16");
  STD_TORCH_CHECK(x_any.dim() >= 1, "add_layer_norm: expected x (..., H)");
  const Tensor x = as_contiguous(x_any), weight = as_contiguous(weight_any);
  const std::vector<int64_t> sizes = sizes_of(x);
  AddLayerNorm a{};
  a.M = rows_of("add_layer_norm", sizes);
  a.H = sizes.back();
  product("add_layer_norm", {a.M, a.H});
  a.eps = static_cast<float>(eps);
  const auto check_row = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == a.H,
                    "add_layer_norm: expected ", name, " of shape (", a.H, ") and the dtype of x");
  };
  std::optional<Tensor> residual, bias;
  check_row(weight, "weight");
  if (bias_any) {
    check_row(*bias_any, "bias");
    bias = as_contiguous(*bias_any);
    a.bias = bias->data_ptr();
  }
  if (residual_any) {
    STD_TORCH_CHECK(residual_any->scalar_type() == dtype && sizes_of(*residual_any) == sizes,
                    "add_layer_norm: expected residual of the shape and dtype of x");
    residual = as_contiguous(*residual_any);
    a.residual = residual->data_ptr();
  }
  Tensor y = empty(sizes, dtype);
  a.x = x.data_ptr();
  a.weight = weight.data_ptr();
  a.y = y.data_ptr();
  if (a.M == 0 || a.H == 0) return y;
  run_parts(dtype == ScalarType::BFloat16 ? forward_kernel<bf16>() : forward_kernel<f32>(), a, a.M * a.H * kNormWork);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm)); }

// sparse_conv1d: checks, allocation, and how long the runs of its lanes are.
#include "../cpu/sparse_conv1d/sparse_conv1d.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common.h"

#define FORWARD(isa, dtype, suffix) SparseConv1dKernel sparse_conv1d_##dtype##_##suffix;
#include "../cpu/sparse_conv1d/sparse_conv1d.inc"

namespace {

enum Dtype { f32, bf16, i8 };

template <Dtype dtype>
SparseConv1dKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, sparse_conv1d_##type##_##suffix},
  static const Listed<SparseConv1dKernel> list[] = {
#include "../cpu/sparse_conv1d/sparse_conv1d.inc"
  };
  return best_kernel(list);
}

// Chooses T and run. Long runs read fewer rows of x twice; many short ones keep lanes and threads busy. Times are in
// those of a multiplication in all lanes; transposing a row takes kTranspose for each of its words and outputs.
void choose_runs(SparseConv1d& a, int64_t stored, int unit) {
  constexpr int64_t kTranspose = 8, kTileWords = 1 << 17;  // half of a second-level cache of 1 MB
  const int64_t parts = torch::stable::get_num_threads();
  const int64_t multiply = stored / unit + a.weight.N * kTranspose;
  int64_t least = INT64_MAX;
  SparseConv1d tried = a;
  for (tried.T = 16; tried.T <= 32; tried.T += 16)
    for (tried.run = 1; tried.run <= (a.P + a.spacing - 1) / a.spacing; tried.run++) {
      if (tried.run > 1 && work_of(tried.rows(), a.C * tried.T) > kTileWords) break;
      const int64_t tiles = tried.tiles(), vectors = tried.T / 16;
      const int64_t each = (tiles + parts - 1) / parts;  // tiles that a thread packs
      const int64_t time =
          vectors * (tiles * tried.run * multiply / parts + each * tried.rows() * a.C * kTranspose);
      if (time < least) {
        least = time;
        a.T = tried.T;
        a.run = tried.run;
      }
    }
}

Tensor sparse_conv1d(
    const Tensor& x_any, const Tensor& crow, const Tensor& col, const Tensor& values_any,
    const std::optional<Tensor>& bias_any, const std::string& activation, int64_t kernel_size, int64_t stride,
    std::vector<int64_t> padding, int64_t dilation, const std::optional<Tensor>& scales_any, double input_scale) {
  const char* op = "sparse_conv1d";
  const ScalarType x_dtype = x_any.scalar_type(), dtype = values_any.scalar_type();
  const bool quantized = dtype == ScalarType::Char;
  STD_TORCH_CHECK(x_dtype == ScalarType::Float || x_dtype == ScalarType::BFloat16,
                  op, ": expected x of dtype float32 or bfloat16");
  STD_TORCH_CHECK(quantized || dtype == x_dtype, op, ": expected values of the dtype of x, or int8");
  STD_TORCH_CHECK(x_any.dim() == 3 && values_any.dim() == 3, op, ": expected x (B, L, C) and values (nnzb, n, k)");
  STD_TORCH_CHECK(padding.size() == 2, op, ": expected two paddings");
  checked_size(op, "kernel_size", kernel_size, 1);
  checked_size(op, "stride", stride, 1);
  checked_size(op, "dilation", dilation, 1);
  for (const int64_t side : padding) checked_size(op, "padding", side);
  const Tensor x = as_contiguous(x_any), values = as_contiguous(values_any);
  SparseConv1d a{};
  a.B = checked_size(op, "sequences", x.size(0));
  a.L = checked_size(op, "positions", x.size(1));
  a.C = checked_size(op, "channels", x.size(2));
  a.taps = kernel_size;
  a.stride = stride;
  a.dilation = dilation;
  a.padding = padding[0];
  const int64_t padded = a.L + padding[0] + padding[1], span = dilation * (kernel_size - 1) + 1;
  STD_TORCH_CHECK(padded >= span, op, ": expected sequences as long as the kernel, ", span, ", got ", padded);
  a.P = (padded - span) / stride + 1;
  STD_TORCH_CHECK(a.B * a.L < INT32_MAX && a.B * a.P < INT32_MAX, op, ": expected fewer than 2^31 positions");
  Projection& p = a.weight;
  p.n = checked_side(op, values.size(1));
  p.k = checked_side(op, values.size(2));
  p.K = kernel_size * a.C;
  p.N = check_pattern(op, crow, col, values.size(0), p.n, p.k, p.K);
  p.crow = ints(crow);
  p.col = ints(col);
  p.values = values.data_ptr();
  std::optional<Tensor> scales;
  STD_TORCH_CHECK(quantized == scales_any.has_value(), op, ": expected scales with int8 values, and only then");
  if (quantized) {
    STD_TORCH_CHECK(p.k % 4 == 0 && a.C % 4 == 0 && p.K <= kInt8Columns, op, ": expected int8 with blocks of k and channels",
                    " that are multiples of 4, got ", p.k, " and ", a.C, ", and at most ", kInt8Columns, " columns, got ", p.K);
    STD_TORCH_CHECK(scales_any->scalar_type() == ScalarType::Float && scales_any->dim() == 1 && scales_any->size(0) == p.N,
                    op, ": expected float32 scales of shape (", p.N, ")");
    STD_TORCH_CHECK(input_scale >= 0 && input_scale < 1e30, op, ": expected a finite input_scale of at least 0");
    scales = as_contiguous(*scales_any);
    p.scales = static_cast<const float*>(scales->data_ptr());
    a.input_scale = static_cast<float>(input_scale);
  }
  std::vector<float> bias(p.N);
  if (bias_any) {
    STD_TORCH_CHECK(bias_any->scalar_type() == x_dtype && bias_any->dim() == 1 && bias_any->size(0) == p.N,
                    op, ": expected bias of the dtype of x and shape (", p.N, ")");
    const Tensor given = as_contiguous(*bias_any);
    const uint16_t* halves = static_cast<const uint16_t*>(given.data_ptr());
    if (x_dtype == ScalarType::Float)
      std::memcpy(bias.data(), given.data_ptr(), p.N * sizeof(float));
    else
      for (int64_t i = 0; i < p.N; i++) {
        const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
        std::memcpy(&bias[i], &bits, sizeof bits);
      }
  }
  p.bias = bias.data();
  a.activation = activation_of(op, activation);
  a.half = x_dtype == ScalarType::BFloat16;
  const int64_t common = std::gcd(stride, dilation);
  a.spacing = std::min(dilation / common, a.P);  // farther apart there is nothing: every run has one output
  a.advance = stride / common;
  Tensor y = empty({a.B, a.P, p.N}, x_dtype);
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  if (a.B == 0 || p.N == 0) return y;
  const int64_t stored = values.size(0) * p.n * p.k;
  choose_runs(a, stored, quantized ? 4 : a.half ? 2 : 1);
  SparseConv1dKernel* kernel = quantized ? forward_kernel<i8>() : a.half ? forward_kernel<bf16>() : forward_kernel<f32>();
  run_parts(kernel, a, work_of(a.B * a.P, stored + p.N));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("sparse_conv1d", TORCH_BOX(&sparse_conv1d)); }

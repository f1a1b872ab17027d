// sparse_ffn: checks and allocation.
#include "../cpu/sparse_ffn/sparse_ffn.h"

#include "projection.h"

#define FORWARD(isa, dtype, suffix) SparseFfnKernel sparse_ffn_##dtype##_##suffix;
#include "../cpu/sparse_ffn/sparse_ffn.inc"

namespace {

enum Dtype { f32, bf16, i8 };

template <Dtype dtype>
SparseFfnKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, sparse_ffn_##type##_##suffix},
  static const Listed<SparseFfnKernel> list[] = {
#include "../cpu/sparse_ffn/sparse_ffn.inc"
  };
  return best_kernel(list);
}

Tensor sparse_ffn(const Tensor& x_any, const Tensors& fc1, const Tensors& fc2, const std::string& activation) {
  const ScalarType x_dtype = x_any.scalar_type(), dtype = dtype_of("sparse_ffn", fc1);
  STD_TORCH_CHECK((x_dtype == ScalarType::Float || x_dtype == ScalarType::BFloat16) && x_any.dim() >= 1,
                  "sparse_ffn: expected x (..., H) of dtype float32 or bfloat16");
  const Tensor x = as_contiguous(x_any);
  std::vector<int64_t> sizes = sizes_of(x);
  SparseFfn a{};
  a.M = rows_of("sparse_ffn", sizes);
  const int64_t F = rows_of("sparse_ffn", fc1);
  a.fc1 = projection("sparse_ffn", "fc1", fc1, dtype, F, sizes.back());
  a.fc2 = projection("sparse_ffn", "fc2", fc2, dtype, rows_of("sparse_ffn", fc2), F);
  a.activation = activation_of("sparse_ffn", activation);
  a.half = x_dtype == ScalarType::BFloat16;
  // Wide tiles read the weights half as often; narrow ones are more, for threads to share.
  a.T = (a.M + 15) / 16 <= static_cast<int64_t>(torch::stable::get_num_threads()) ? 16 : 32;
  sizes.back() = a.fc2.N;
  Tensor y = empty(sizes, x_dtype);
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  if (a.M == 0) return y;

  Projection* const all[] = {&a.fc1, &a.fc2};
  const int64_t weights = stored(a.fc1) + stored(a.fc2);
  SparseFfnKernel* kernel = dtype == ScalarType::Char       ? forward_kernel<i8>()
                            : dtype == ScalarType::BFloat16 ? forward_kernel<bf16>()
                                                            : forward_kernel<f32>();
  const auto run = [&](SparseFfnPhase phase, int64_t work) {
    run_parts([&](const SparseFfn& args, int part, int parts, float* scratch) { kernel(args, phase, part, parts, scratch); },
              a, work);
  };
  std::vector<int32_t> row_sums;
  if (add_row_sums(all, row_sums)) run(kFfnSums, weights / 8);
  run(kFfnTiles, work_of(a.M, weights));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn)); }

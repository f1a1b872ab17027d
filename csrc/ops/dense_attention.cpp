// dense_attention: checks, which token goes to which lane, and allocation.
#include "../cpu/dense_attention/dense_attention.h"
#include "../cpu/encoder_layer/encoder_layer.h"

#include <algorithm>
#include <cstring>

#include "common.h"

#define FORWARD(isa, dtype, suffix) DenseAttentionKernel dense_attention_##dtype##_##suffix;
#include "../cpu/dense_attention/dense_attention.inc"

namespace {

enum Dtype { f32, bf16 };

template <Dtype dtype>
DenseAttentionKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, dense_attention_##type##_##suffix},
  static const Listed<DenseAttentionKernel> list[] = {
#include "../cpu/dense_attention/dense_attention.inc"
  };
  return best_kernel(list);
}

// (B, S, columns) as B * S rows that lie `ld` apart, copied only if they do not.
struct Rows {
  Tensor tensor;
  int64_t ld;

  explicit Rows(const Tensor& t) : tensor(t), ld(t.size(1) == 1 ? t.stride(0) : t.stride(1)) {
    const bool even = t.size(0) <= 1 || t.size(1) == 1 || t.stride(0) == t.size(1) * ld;
    if (even && (t.size(2) <= 1 || t.stride(2) == 1)) return;
    tensor = torch::stable::contiguous(t);
    ld = t.size(2);
  }
};

// Lanes for the real tokens of each sequence, which begins a tile.
struct Layout {
  std::vector<int32_t> source, positions;
  std::vector<int64_t> tiles{0}, lengths;
  int64_t longest = 0, products = 0;  // products: pairs of a query and a key

  Layout(const bool* real, int64_t B, int64_t S, int T) {
    const int64_t lanes = product("dense_attention", {B, (S + T - 1) / T, T});
    STD_TORCH_CHECK(lanes < INT32_MAX, "dense_attention: expected fewer than 2^31 tokens, got ", lanes);
    source.reserve(lanes);
    positions.reserve(lanes);
    for (int64_t b = 0; b < B; b++) {
      const size_t begin = source.size();
      for (int64_t s = 0; s < S; s++) {
        if (real && !real[b * S + s]) continue;
        source.push_back(static_cast<int32_t>(b * S + s));
        positions.push_back(static_cast<int32_t>(s));
      }
      const int64_t count = static_cast<int64_t>(source.size() - begin), used = (count + T - 1) / T;
      source.resize(begin + used * T, -1);
      positions.resize(begin + used * T, 0);
      tiles.push_back(tiles.back() + used);
      lengths.push_back(count);
      longest = std::max(longest, used);
      products += count * count;
    }
  }
};

Tensor dense_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads, const std::optional<Tensor>& mask_any,
    double scale, const std::optional<Tensor>& position_bias_any) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && key.scalar_type() == dtype &&
                      value.scalar_type() == dtype,
                  "dense_attention: expected query, key and value, all float32 or all bfloat16");
  STD_TORCH_CHECK(query.dim() == 3 && value.dim() == 3 && sizes_of(query) == sizes_of(key) &&
                      value.size(0) == query.size(0) && value.size(1) == query.size(1),
                  "dense_attention: expected query and key (B, S, heads * d) and value (B, S, heads * e)");
  STD_TORCH_CHECK(heads > 0 && query.size(2) % heads == 0 && value.size(2) % heads == 0,
                  "dense_attention: expected columns in multiples of ", heads, " heads");
  checked_size("dense_attention", "heads", heads);
  const int64_t B = query.size(0), S = query.size(1), tokens = product("dense_attention", {B, S});
  for (const Tensor* t : {&query, &value}) checked_size("dense_attention", "columns", t->size(2));
  std::optional<Tensor> mask, position_bias;
  if (mask_any) {
    STD_TORCH_CHECK(mask_any->scalar_type() == ScalarType::Bool && mask_any->dim() == 2 && mask_any->size(0) == B &&
                        mask_any->size(1) == S,
                    "dense_attention: expected a bool mask of shape (", B, ", ", S, ")");
    mask = as_contiguous(*mask_any);
  }
  const bool* real = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  const int64_t count = real ? std::count(real, real + tokens, true) : tokens;
  DenseAttention a{};
  if (position_bias_any) {
    STD_TORCH_CHECK(position_bias_any->scalar_type() == ScalarType::Float && position_bias_any->dim() == 3 &&
                        position_bias_any->size(0) == heads && position_bias_any->size(1) == S && position_bias_any->size(2) == S &&
                        S <= kMostPositions,
                    "dense_attention: expected a float32 position_bias of shape (", heads, ", ", S, ", ", S, "), S at most ",
                    kMostPositions);
    position_bias = as_contiguous(*position_bias_any);
    a.position_bias = static_cast<const float*>(position_bias->data_ptr());
    a.side = S;
  }
  Tensor y = empty({B, S, value.size(2)}, dtype);
  a.half = dtype == ScalarType::BFloat16;
  if (count < tokens) std::memset(y.data_ptr(), 0, tokens * value.size(2) * (a.half ? 2 : 4));
  if (count == 0 || value.size(2) == 0) return y;

  a.T = count <= 16 * B ? 16 : 32;
  const Layout layout(real, B, S, a.T);
  a.source = layout.source.data();
  a.positions = layout.positions.data();
  a.tiles = layout.tiles.data();
  a.lengths = layout.lengths.data();
  a.sequences = B;
  a.longest = layout.longest;
  a.heads = static_cast<int>(heads);
  a.scale = static_cast<float>(scale);
  a.query_width = query.size(2) / heads;
  a.value_width = value.size(2) / heads;
  const Rows queries(query), keys(key), values(value);
  a.query = queries.tensor.data_ptr();
  a.key = keys.tensor.data_ptr();
  a.value = values.tensor.data_ptr();
  a.query_ld = queries.ld;
  a.key_ld = keys.ld;
  a.value_ld = values.ld;
  a.y = y.data_ptr();
  run_parts(a.half ? forward_kernel<bf16>() : forward_kernel<f32>(), a, work_of(layout.products, query.size(2) + value.size(2)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("dense_attention", TORCH_BOX(&dense_attention)); }

// block_sparse_attention: checks, allocation, and patterns as kernels read them.
#include "../cpu/block_sparse_attention/block_sparse_attention.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common.h"

#define FORWARD(isa, dtype, suffix) BlockSparseAttentionKernel block_sparse_attention_##dtype##_##suffix;
#define BACKWARD(isa, dtype, suffix) BlockSparseAttentionKernel block_sparse_attention_backward_##dtype##_##suffix;
#include "../cpu/block_sparse_attention/block_sparse_attention.inc"

namespace {

enum Dtype { f32, bf16 };

template <Dtype dtype>
BlockSparseAttentionKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, block_sparse_attention_##type##_##suffix},
  static const Listed<BlockSparseAttentionKernel> list[] = {
#include "../cpu/block_sparse_attention/block_sparse_attention.inc"
  };
  return best_kernel(list);
}

template <Dtype dtype>
BlockSparseAttentionKernel* backward_kernel() {
#define BACKWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, block_sparse_attention_backward_##type##_##suffix},
  static const Listed<BlockSparseAttentionKernel> list[] = {
#include "../cpu/block_sparse_attention/block_sparse_attention.inc"
  };
  return best_kernel(list);
}

// (B, H, L, D) as rows of neighbouring elements, copied only if they are not; `keep` owns what is read.
AttentionRows rows_of(const Tensor& t, Tensor& keep) {
  keep = t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  return {keep.data_ptr(), {keep.stride(0), keep.stride(1), keep.stride(2)}};
}

// What both directions take, checked, and the tensors that must outlive the call.
struct Call {
  BlockSparseAttention a{};
  ScalarType dtype;
  Tensor query, key, value, grad, crow, col, index, mask, lse, delta;
  std::vector<uint8_t> patterns;
  std::vector<TilePattern> tiles;
  int64_t work = 0;  // in multiply-adds

  Call(const Tensor& query_any, const Tensor& key_any, const Tensor& value_any, const Tensor& crow_any, const Tensor& col_any,
       const Tensor& index_any, const Tensor& patterns_any, const std::optional<Tensor>& mask_any, double scale)
      : dtype(query_any.scalar_type()), query(query_any), key(key_any), value(value_any), grad(query_any),
        crow(as_contiguous(crow_any)), col(as_contiguous(col_any)), index(as_contiguous(index_any)), mask(crow), lse(crow),
        delta(crow) {
    STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && key.scalar_type() == dtype &&
                        value.scalar_type() == dtype,
                    "block_sparse_attention: expected query, key and value, all float32 or all bfloat16");
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && key.size(0) == query.size(0) &&
                        key.size(3) == query.size(3) && value.size(0) == key.size(0) && value.size(1) == key.size(1) &&
                        value.size(2) == key.size(2),
                    "block_sparse_attention: expected query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, E)");
    const auto size = [](const char* name, int64_t value) { return checked_size("block_sparse_attention", name, value); };
    a.batch = size("sequences", query.size(0));
    a.heads = size("heads", query.size(1));
    a.queries = size("queries", query.size(2));
    a.width = size("features", query.size(3));
    a.kv_heads = size("key heads", key.size(1));
    a.keys = size("keys", key.size(2));
    a.value_width = size("features", value.size(3));
    a.scale = static_cast<float>(scale);
    a.half = dtype == ScalarType::BFloat16;
    STD_TORCH_CHECK(a.kv_heads ? a.heads % a.kv_heads == 0 : a.heads == 0,
                    "block_sparse_attention: expected query heads in multiples of ", a.kv_heads, ", got ", a.heads);
    STD_TORCH_CHECK(a.queries < INT32_MAX && a.keys < INT32_MAX,
                    "block_sparse_attention: expected fewer than 2^31 queries and keys");
    check_mask(patterns_any);
    if (mask_any) {
      STD_TORCH_CHECK(mask_any->scalar_type() == ScalarType::Bool && mask_any->dim() == 2 && mask_any->size(0) == a.batch &&
                          mask_any->size(1) == a.keys,
                      "block_sparse_attention: expected a bool key_mask of shape (", a.batch, ", ", a.keys, ")");
      mask = as_contiguous(*mask_any);
      a.key_mask = static_cast<const uint8_t*>(mask.data_ptr());
    }
    a.query = rows_of(query, query);
    a.key = rows_of(key, key);
    a.value = rows_of(value, value);
  }

  void check_mask(const Tensor& patterns_any) {
    STD_TORCH_CHECK(patterns_any.dim() == 3 && patterns_any.scalar_type() == ScalarType::Bool &&
                        patterns_any.size(1) % 16 == 0 && patterns_any.size(2) % 16 == 0 && patterns_any.size(1) > 0 &&
                        patterns_any.size(2) > 0,
                    "block_sparse_attention: expected bool patterns (P, m, n), m and n multiples of 16");
    a.rows = checked_side("block_sparse_attention", patterns_any.size(1));
    a.columns = checked_side("block_sparse_attention", patterns_any.size(2));
    const int64_t entries = crow.dim() == 1 ? crow.size(0) - 1 : -1, R = a.block_rows();
    a.mask_heads = R ? entries / R : 1;
    STD_TORCH_CHECK(crow.scalar_type() == ScalarType::Int && col.scalar_type() == ScalarType::Int &&
                        index.scalar_type() == ScalarType::Int && col.dim() == 1 && index.dim() == 1 &&
                        col.size(0) == index.size(0) && entries >= 0 &&
                        (R == 0 || (entries % R == 0 && (a.mask_heads == 1 || a.mask_heads == a.heads))),
                    "block_sparse_attention: expected int32 indices of a mask with ", R, " block rows for 1 or ", a.heads,
                    " heads");
    check_indices(entries, patterns_any.size(0));
    a.T = a.rows % 32 == 0 && a.columns % 32 == 0 && a.queries > 16 ? 32 : 16;
    a.crow_indices = ints(crow);
    a.col_indices = ints(col);
    a.pattern_indices = ints(index);
    const Tensor source = as_contiguous(patterns_any);
    const auto* from = static_cast<const uint8_t*>(source.data_ptr());
    patterns.resize(patterns_any.numel());  // a column of queries for each key
    for (int64_t p = 0; p < source.size(0); p++)
      for (int64_t i = 0; i < a.rows; i++)
        for (int64_t j = 0; j < a.columns; j++)
          patterns[(p * a.columns + j) * a.rows + i] = from[(p * a.rows + i) * a.columns + j] != 0;
    a.patterns = patterns.data();
    tiles.resize(patterns.size() / (a.T * a.T));
    find_tiles(a, source.size(0), tiles.data());
    a.tiles = tiles.data();
    const int64_t each = product("block_sparse_attention", {a.rows, a.columns, a.width + a.value_width});
    work = work_of(work_of(col.size(0), (a.mask_heads > 1 ? 1 : a.heads) * a.batch), each);
    // Of what is written, and of scratch: the keys of a head, and their gradients.
    product("block_sparse_attention", {a.batch, a.heads, a.queries, a.width + a.value_width + 1});
    product("block_sparse_attention", {a.batch, a.kv_heads + 1, kMostSplits, a.keys + a.T, a.width + a.value_width + 34});
  }

  // Columns increase: kernels have room for every key once.
  void check_indices(int64_t rows, int64_t count) const {
    const int32_t *row = ints(crow), *column = ints(col);
    const int64_t blocks = col.size(0), columns = (a.keys + a.columns - 1) / a.columns;
    STD_TORCH_CHECK(are_row_pointers(row, rows, blocks), "block_sparse_attention: expected crow_indices from 0 to ", blocks,
                    " that never decrease");
    STD_TORCH_CHECK(all_below(column, blocks, columns), "block_sparse_attention: expected col_indices in [0, ", columns, ")");
    for (int64_t r = 0; r < rows; r++)
      for (int64_t p = row[r] + 1; p < row[r + 1]; p++)
        STD_TORCH_CHECK(column[p - 1] < column[p], "block_sparse_attention: expected col_indices to increase within each row");
    for (int64_t p = 0; p < blocks; p++)
      STD_TORCH_CHECK(-1 <= ints(index)[p] && ints(index)[p] < count, "block_sparse_attention: expected pattern_indices in [-1, ",
                      count, "), got ", ints(index)[p]);
  }

  bool nothing() const { return a.batch == 0 || a.heads == 0 || a.queries == 0; }
};

std::tuple<Tensor, Tensor> block_sparse_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& crow, const Tensor& col, const Tensor& index,
    const Tensor& patterns, const std::optional<Tensor>& key_mask, double scale) {
  Call call(query, key, value, crow, col, index, patterns, key_mask, scale);
  BlockSparseAttention& a = call.a;
  Tensor y = empty({a.batch, a.heads, a.queries, a.value_width}, call.dtype);
  Tensor lse = empty({a.batch, a.heads, a.queries}, ScalarType::Float);
  if (call.nothing()) return {y, lse};
  a.y = y.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  run_parts(a.half ? forward_kernel<bf16>() : forward_kernel<f32>(), a, call.work);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lse, const Tensor& delta,
    const Tensor& crow, const Tensor& col, const Tensor& index, const Tensor& patterns, const std::optional<Tensor>& key_mask,
    double scale) {
  Call call(query, key, value, crow, col, index, patterns, key_mask, scale);
  BlockSparseAttention& a = call.a;
  const std::vector<int64_t> rows = {a.batch, a.heads, a.queries};
  STD_TORCH_CHECK(grad.scalar_type() == call.dtype && sizes_of(grad) == std::vector<int64_t>({a.batch, a.heads, a.queries, a.value_width}),
                  "block_sparse_attention: expected grad of the context's shape and dtype");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && delta.scalar_type() == ScalarType::Float && sizes_of(lse) == rows &&
                      sizes_of(delta) == rows,
                  "block_sparse_attention: expected float32 lse and delta of shape (B, H, Lq)");
  call.lse = as_contiguous(lse);
  call.delta = as_contiguous(delta);
  Tensor grad_query = empty(sizes_of(query), call.dtype), grad_key = empty(sizes_of(key), call.dtype),
         grad_value = empty(sizes_of(value), call.dtype);
  if (call.nothing() || a.keys == 0) {
    for (const Tensor& t : {grad_query, grad_key, grad_value})
      if (t.numel()) std::memset(t.data_ptr(), 0, t.numel() * (a.half ? 2 : 4));
    return {grad_query, grad_key, grad_value};
  }
  a.grad = rows_of(grad, call.grad);
  a.lse = static_cast<float*>(call.lse.data_ptr());
  a.delta = static_cast<const float*>(call.delta.data_ptr());
  a.grad_query = grad_query.data_ptr();
  a.grad_key = grad_key.data_ptr();
  a.grad_value = grad_value.data_ptr();
  const auto kernel = a.half ? backward_kernel<bf16>() : backward_kernel<f32>();
  const int64_t heads = a.batch * a.kv_heads, rows_of_head = a.heads / a.kv_heads * a.block_rows();
  // By no number of threads, so that gradients do not depend on it.
  a.splits = std::clamp<int64_t>(kMostSplits / heads, 1, rows_of_head);
  if (a.splits == 1) {
    run_parts(kernel, a, 3 * call.work);
    return {grad_query, grad_key, grad_value};
  }
  Scratch split_grads;
  a.split_grads = split_grads.at_least(heads * a.splits * a.grad_words());
  run_parts(kernel, a, 3 * call.work);
  a.adding = true;
  run_parts(kernel, a, heads * a.splits * a.grad_words());
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward));
}

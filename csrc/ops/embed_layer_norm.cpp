// embed_layer_norm: checks of every index, and allocation.
#include "../cpu/embed_layer_norm/embed_layer_norm.h"

#include <stdexcept>

#include "common.h"

#define FORWARD(isa, dtype, suffix) EmbedLayerNormKernel embed_layer_norm_##dtype##_##suffix;
#include "../cpu/embed_layer_norm/embed_layer_norm.inc"

namespace {

enum Dtype { f32, bf16 };

template <Dtype dtype>
EmbedLayerNormKernel* forward_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, embed_layer_norm_##type##_##suffix},
  static const Listed<EmbedLayerNormKernel> list[] = {
#include "../cpu/embed_layer_norm/embed_layer_norm.inc"
  };
  return best_kernel(list);
}

const int64_t* indices(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

// An IndexError in Python for an id outside of its table.
void check_range(const char* name, const Tensor& ids, int64_t rows) {
  const int64_t count = ids.numel();
  uint64_t largest = 0;  // a negative id counts as larger than any table
  for (int64_t i = 0; i < count; i++) {
    const uint64_t id = static_cast<uint64_t>(indices(ids)[i]);
    largest = id > largest ? id : largest;
  }
  if (count == 0 || largest < static_cast<uint64_t>(rows)) return;
  throw std::out_of_range("embed_layer_norm: expected " + std::string(name) + " from 0 to " + std::to_string(rows - 1) +
                          ", got " + std::to_string(static_cast<int64_t>(largest)));
}

// A ValueError in Python for a position beyond the table, of which the first `reserved` rows are for no position.
void check_length(int64_t length, int64_t rows, int64_t reserved) {
  if (length <= rows - reserved) return;
  throw std::invalid_argument("embed_layer_norm: expected at most P = " + std::to_string(rows - reserved) +
                              " positions, got S = " + std::to_string(length));
}

// padding_idx at padding, and from padding_idx + 1 on for the other ids of each sequence.
std::vector<int64_t> counted_positions(const Tensor& ids, int64_t S, int64_t padding_idx, int64_t rows) {
  if (padding_idx >= rows)
    throw std::invalid_argument("embed_layer_norm: expected padding_idx below P = " + std::to_string(rows) + ", got " +
                                std::to_string(padding_idx));
  std::vector<int64_t> positions(ids.numel());
  int64_t longest = 0;
  for (int64_t i = 0, count = 0; i < ids.numel(); i++) {
    if (i % S == 0) count = 0;
    const bool real = indices(ids)[i] != padding_idx;
    count += real;
    longest = count > longest ? count : longest;
    positions[i] = real ? padding_idx + count : padding_idx;
  }
  check_length(longest, rows, padding_idx + 1);
  return positions;
}

Tensor embed_layer_norm(
    const Tensor& ids_any, const Tensor& word_any, const std::optional<Tensor>& position_any,
    const std::optional<Tensor>& token_type_any, const std::optional<Tensor>& position_ids_any,
    const std::optional<Tensor>& token_type_ids_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any,
    double eps, std::optional<int64_t> padding_idx) {
  const ScalarType dtype = word_any.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "embed_layer_norm: expected tables of dtype float32 or bfloat16");
  STD_TORCH_CHECK(ids_any.dim() >= 1 && word_any.dim() == 2, "embed_layer_norm: expected ids (..., S) and word (V, H)");
  std::vector<int64_t> sizes = sizes_of(ids_any);
  EmbedLayerNorm a{};
  a.M = ids_any.numel();
  a.S = sizes.back();
  a.H = word_any.size(1);
  product("embed_layer_norm", {a.M, a.H});
  a.eps = static_cast<float>(eps);
  const auto checked_ids = [&](const Tensor& t, const char* name) {
    const bool fits = sizes_of(t) == sizes || (t.dim() >= 1 && t.numel() == a.S && t.size(t.dim() - 1) == a.S);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && fits,
                    "embed_layer_norm: expected int64 ", name, " of the shape of ids, or of one sequence");
    return as_contiguous(t);
  };
  const auto checked_table = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 2 && t.size(1) == a.H,
                    "embed_layer_norm: expected ", name, " with H = ", a.H, " columns and the dtype of word");
    return as_contiguous(t);
  };
  const auto checked_row = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == a.H,
                    "embed_layer_norm: expected ", name, " of shape (", a.H, ") and the dtype of word");
    return as_contiguous(t);
  };
  STD_TORCH_CHECK(position_any || (!position_ids_any && !padding_idx),
                  "embed_layer_norm: expected position_ids or padding_idx only with a table of positions");
  STD_TORCH_CHECK(!padding_idx || (!position_ids_any && *padding_idx >= 0),
                  "embed_layer_norm: expected padding_idx of at least 0, and no position_ids beside it");
  STD_TORCH_CHECK(token_type_any || !token_type_ids_any,
                  "embed_layer_norm: expected token_type_ids only with a table of token types");

  const Tensor ids = checked_ids(ids_any, "ids"), word = checked_table(word_any, "word");
  const Tensor weight = checked_row(weight_any, "weight");
  std::optional<Tensor> bias, position, token_type, position_ids, token_type_ids;
  std::vector<int64_t> counted;
  check_range("ids", ids, word.size(0));
  if (bias_any) {
    bias = checked_row(*bias_any, "bias");
    a.bias = bias->data_ptr();
  }
  if (token_type_any) {
    token_type = checked_table(*token_type_any, "token_type");
    a.token_type = token_type->data_ptr();
    STD_TORCH_CHECK(token_type->size(0) > 0, "embed_layer_norm: expected at least one row in token_type");
  }
  if (token_type_ids_any) {
    token_type_ids = checked_ids(*token_type_ids_any, "token_type_ids");
    check_range("token_type_ids", *token_type_ids, token_type->size(0));
    a.token_type_ids = indices(*token_type_ids);
    a.token_type_count = token_type_ids->numel();
  }
  if (position_any) {
    position = checked_table(*position_any, "position");
    a.position = position->data_ptr();
  }
  if (position_ids_any) {
    position_ids = checked_ids(*position_ids_any, "position_ids");
    check_range("position_ids", *position_ids, position->size(0));
    a.position_ids = indices(*position_ids);
    a.position_count = position_ids->numel();
  } else if (padding_idx) {
    counted = counted_positions(ids, a.S, *padding_idx, position->size(0));
    a.position_ids = counted.data();
    a.position_count = a.M;
  } else if (position) {
    check_length(a.S, position->size(0), 0);
  }

  sizes.push_back(a.H);
  Tensor y = empty(sizes, dtype);
  a.ids = indices(ids);
  a.word = word.data_ptr();
  a.weight = weight.data_ptr();
  a.y = y.data_ptr();
  if (a.M == 0 || a.H == 0) return y;
  run_parts(dtype == ScalarType::BFloat16 ? forward_kernel<bf16>() : forward_kernel<f32>(), a, a.M * a.H * kNormWork);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) { m.impl("embed_layer_norm", TORCH_BOX(&embed_layer_norm)); }

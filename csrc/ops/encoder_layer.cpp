// encoder_pack, encoder_layer, encoder_unpack: checks and allocation.
#include "../cpu/encoder_layer/encoder_layer.h"

#include <cstring>
#include <tuple>

#include "projection.h"

#define FORWARD(isa, dtype, suffix) EncoderLayerKernel encoder_layer_##dtype##_##suffix;
#define ROWS(isa, suffix) EncoderRowsKernel encoder_pack_##suffix, encoder_unpack_##suffix;
#include "../cpu/encoder_layer/encoder_layer.inc"

namespace {

enum Dtype { f32, bf16, i8 };

template <Dtype dtype>
EncoderLayerKernel* layer_kernel() {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, encoder_layer_##type##_##suffix},
  static const Listed<EncoderLayerKernel> list[] = {
#include "../cpu/encoder_layer/encoder_layer.inc"
  };
  return best_kernel(list);
}

EncoderRowsKernel* pack_kernel() {
#define ROWS(isa, suffix) {isa, encoder_pack_##suffix},
  static const Listed<EncoderRowsKernel> list[] = {
#include "../cpu/encoder_layer/encoder_layer.inc"
  };
  return best_kernel(list);
}

EncoderRowsKernel* unpack_kernel() {
#define ROWS(isa, suffix) {isa, encoder_unpack_##suffix},
  static const Listed<EncoderRowsKernel> list[] = {
#include "../cpu/encoder_layer/encoder_layer.inc"
  };
  return best_kernel(list);
}

void check_tile(int64_t tile) {
  STD_TORCH_CHECK(tile == 16 || tile == 32, "encoder_pack: expected tiles of 16 or 32 tokens, got ", tile);
}

// Tokens of a stream, and its spans checked.
int64_t check_stream(const Tensor& stream, const Tensor& spans) {
  STD_TORCH_CHECK(is_plain(stream, ScalarType::Float, 3), "encoder_layer: expected a contiguous float32 stream (tiles, H, T)");
  check_tile(stream.size(2));
  checked_size("encoder_layer", "H", stream.size(1));
  const int64_t T = stream.size(2), lanes = checked_size("encoder_layer", "tokens", product("encoder_layer", {stream.size(0), T}));
  STD_TORCH_CHECK(is_plain(spans, ScalarType::Int, 2) && spans.size(0) == 4 && spans.size(1) == lanes,
                  "encoder_layer: expected contiguous int32 spans of shape (4, ", lanes, ")");
  const int32_t *source = ints(spans), *first = source + lanes, *last = first + lanes;
  int64_t tokens = lanes;
  while (tokens > 0 && source[tokens - 1] < 0) tokens--;
  for (int64_t i = 0; i < (tokens + T - 1) / T * T; i++)  // lanes without a token attend as well, in a used tile
    STD_TORCH_CHECK(first[i] >= 0 && first[i] < last[i] && last[i] <= tokens,
                    "encoder_layer: expected spans within the ", tokens, " tokens, got [", first[i], ", ", last[i], ")");
  return tokens;
}

void check_rows(const std::vector<int64_t>& rows, const char* name) {
  STD_TORCH_CHECK(!rows.empty() && rows[0] == 0, "encoder_layer: expected ", name, " to begin with 0");
  for (size_t i = 1; i < rows.size(); i++)
    STD_TORCH_CHECK(rows[i] >= rows[i - 1], "encoder_layer: expected ", name, " never to fall");
}

bool all_even(const std::vector<int64_t>& rows) {
  for (int64_t row : rows)
    if (row % 2) return false;
  return true;
}

Tensor encoder_layer(
    const Tensor& stream, const Tensor& spans, const Tensors& query, const Tensors& key, const Tensors& value,
    const Tensors& output, const Tensors& fc1, const Tensors& fc2, const Tensors& norms, std::vector<int64_t> query_rows,
    std::vector<int64_t> value_rows, double scale, const std::string& activation, double eps, bool pre_norm,
    const std::optional<Tensor>& position_bias, const std::string& precision) {
  EncoderLayer a{};
  a.tokens = check_stream(stream, spans);
  a.H = stream.size(1);
  a.T = static_cast<int>(stream.size(2));
  a.tiles = (a.tokens + a.T - 1) / a.T;
  check_rows(query_rows, "query_rows");
  check_rows(value_rows, "value_rows");
  STD_TORCH_CHECK(query_rows.size() == value_rows.size(), "encoder_layer: expected query_rows and value_rows of equal length");
  STD_TORCH_CHECK(norms.size() == 4, "encoder_layer: expected 4 norms, got ", norms.size());
  const ScalarType dtype = dtype_of("encoder_layer", fc1);
  const int64_t F = rows_of("encoder_layer", fc1);
  a.query = projection("encoder_layer", "query", query, dtype, query_rows.back(), a.H);
  a.key = projection("encoder_layer", "key", key, dtype, query_rows.back(), a.H);
  a.value = projection("encoder_layer", "value", value, dtype, value_rows.back(), a.H);
  a.output = projection("encoder_layer", "output", output, dtype, a.H, value_rows.back());
  a.fc1 = projection("encoder_layer", "fc1", fc1, dtype, F, a.H);
  a.fc2 = projection("encoder_layer", "fc2", fc2, dtype, a.H, F);
  a.norm1_weight = floats("encoder_layer", norms[0], a.H, "the first norm's weight");
  a.norm1_bias = floats("encoder_layer", norms[1], a.H, "the first norm's bias");
  a.norm2_weight = floats("encoder_layer", norms[2], a.H, "the second norm's weight");
  a.norm2_bias = floats("encoder_layer", norms[3], a.H, "the second norm's bias");
  a.heads = static_cast<int>(query_rows.size()) - 1;
  a.query_rows = query_rows.data();
  a.value_rows = value_rows.data();
  if (position_bias) {
    STD_TORCH_CHECK(is_plain(*position_bias, ScalarType::Float, 3) && position_bias->size(0) == a.heads &&
                        position_bias->size(1) == position_bias->size(2) && position_bias->size(1) <= kMostPositions,
                    "encoder_layer: expected a contiguous float32 position_bias (heads, S, S), S at most ", kMostPositions);
    a.position_bias = static_cast<const float*>(position_bias->data_ptr());
    a.side = position_bias->size(1);
    a.positions = ints(spans) + 3 * spans.size(1);
    for (int64_t i = 0; i < a.tokens; i++)
      STD_TORCH_CHECK(a.positions[i] >= 0 && a.positions[i] < a.side,
                      "encoder_layer: expected a position_bias for position ", a.positions[i], ", got ", a.side, " positions");
  }
  STD_TORCH_CHECK(precision == "float32" || precision == "bfloat16",
                  "encoder_layer: expected precision float32 or bfloat16, got ", precision);
  a.half = precision == "bfloat16" && dtype != ScalarType::Float;
  a.half_attention = a.half && all_even(query_rows);
  a.scale = static_cast<float>(scale);
  a.eps = static_cast<float>(eps);
  a.pre_norm = pre_norm;
  a.activation = activation_of("encoder_layer", activation);

  const int64_t lanes = spans.size(1), used = a.tiles * a.T;
  a.spans = {ints(spans), ints(spans) + lanes, ints(spans) + 2 * lanes};
  Tensor y = empty(sizes_of(stream), ScalarType::Float);
  a.x = static_cast<const float*>(stream.data_ptr());
  a.y = static_cast<float*>(y.data_ptr());
  std::memset(a.y + used * a.H, 0, (lanes - used) * a.H * sizeof(float));
  Tensor operands = empty({product("encoder_layer", {used, 2 * a.query.N + a.value.N}) + 48}, ScalarType::Float);
  a.queries = static_cast<float*>(operands.data_ptr());
  a.keys = a.queries + used * a.query.N;
  a.values = a.keys + used * a.key.N;
  std::vector<uint8_t> strange(a.tiles);
  a.strange = strange.data();

  Projection* const all[] = {&a.query, &a.key, &a.value, &a.output, &a.fc1, &a.fc2};
  int64_t weights = 0;
  for (const Projection* p : all) weights += stored(*p);
  std::vector<int32_t> row_sums;
  const bool sums_missing = add_row_sums(all, row_sums);
  EncoderLayerKernel* kernel = dtype == ScalarType::Char       ? layer_kernel<i8>()
                               : dtype == ScalarType::BFloat16 ? layer_kernel<bf16>()
                                                               : layer_kernel<f32>();
  const auto run = [&](EncoderPhase phase, int64_t work) {
    run_parts([&](const EncoderLayer& args, int part, int parts, float* scratch) { kernel(args, phase, part, parts, scratch); },
              a, work);
  };
  if (sums_missing) run(kEncoderSums, weights / 8);
  run(kEncoderProject, work_of(a.tokens, weights));
  run(kEncoderRest, work_of(a.tokens, weights));
  return y;
}

std::tuple<Tensor, Tensor> encoder_pack(const Tensor& x_any, const std::optional<Tensor>& mask, int64_t tile) {
  STD_TORCH_CHECK(x_any.dim() == 3 && (x_any.scalar_type() == ScalarType::Float || x_any.scalar_type() == ScalarType::BFloat16),
                  "encoder_pack: expected x (B, S, H) of dtype float32 or bfloat16");
  check_tile(tile);
  const Tensor x = as_contiguous(x_any);
  const int64_t B = x.size(0), S = x.size(1), H = checked_size("encoder_pack", "H", x.size(2));
  const int64_t all = product("encoder_pack", {B, S}), tiles = (all + tile - 1) / tile, lanes = tiles * tile;
  STD_TORCH_CHECK(all < INT32_MAX - 64, "encoder_pack: expected fewer than 2^31 tokens, got ", all);
  std::optional<Tensor> kept;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == B && mask->size(1) == S,
                    "encoder_pack: expected a bool mask of shape (", B, ", ", S, ")");
    kept = as_contiguous(*mask);
  }
  const bool* real = kept ? static_cast<const bool*>(kept->data_ptr()) : nullptr;
  Tensor stream = empty({tiles, H, tile}, ScalarType::Float);
  Tensor spans = empty({4, lanes}, ScalarType::Int);
  int32_t *source = static_cast<int32_t*>(spans.data_ptr()), *first = source + lanes, *last = first + lanes;
  int32_t* position = last + lanes;
  int64_t at = 0;
  for (int64_t b = 0; b < B; b++) {
    const bool* row = real ? real + b * S : nullptr;
    if (row && !std::memchr(row, 1, S)) continue;
    const int64_t begin = at, keys = row && !row[0] ? begin + 1 : begin;
    for (int64_t s = 0; s < S; s++)
      if (!row || row[s] || s == 0) source[at] = static_cast<int32_t>(b * S + s), position[at++] = static_cast<int32_t>(s);
    for (int64_t i = begin; i < at; i++) first[i] = static_cast<int32_t>(keys), last[i] = static_cast<int32_t>(at);
  }
  for (int64_t i = at; i < lanes; i++) {
    source[i] = -1;
    for (int32_t* of : {first, last, position}) of[i] = at ? of[at - 1] : 0;
  }
  EncoderRows a{};
  a.x = x.data_ptr();
  a.stream = static_cast<float*>(stream.data_ptr());
  a.source = source;
  a.tiles = tiles;
  a.H = H;
  a.T = static_cast<int>(tile);
  a.half = x.scalar_type() == ScalarType::BFloat16;
  run_parts(pack_kernel(), a, lanes * H / 4);
  return {stream, spans};
}

Tensor encoder_unpack(const Tensor& stream, const Tensor& spans, int64_t batch, int64_t length, ScalarType dtype) {
  const int64_t tokens = check_stream(stream, spans), H = stream.size(1), T = stream.size(2);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "encoder_unpack: expected dtype float32 or bfloat16");
  STD_TORCH_CHECK(batch >= 0 && length >= 0, "encoder_unpack: expected a batch and a length of at least 0, got ", batch, " and ",
                  length);
  const int64_t all = product("encoder_unpack", {batch, length});
  const int32_t* source = ints(spans);
  for (int64_t i = 0; i < tokens; i++)
    STD_TORCH_CHECK(source[i] >= 0 && source[i] < all, "encoder_unpack: expected tokens of ", batch, " sequences of ",
                    length, ", got token ", source[i]);
  Tensor y = empty({batch, length, H}, dtype);
  if (tokens < all)
    std::memset(y.data_ptr(), 0, all * H * (dtype == ScalarType::Float ? 4 : 2));
  EncoderRows a{};
  a.y = y.data_ptr();
  a.stream = static_cast<float*>(stream.data_ptr());
  a.source = source;
  a.tiles = (tokens + T - 1) / T;
  a.H = H;
  a.T = static_cast<int>(T);
  a.half = dtype == ScalarType::BFloat16;
  run_parts(unpack_kernel(), a, tokens * H / 4);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("encoder_pack", TORCH_BOX(&encoder_pack));
  m.impl("encoder_layer", TORCH_BOX(&encoder_layer));
  m.impl("encoder_unpack", TORCH_BOX(&encoder_unpack));
}

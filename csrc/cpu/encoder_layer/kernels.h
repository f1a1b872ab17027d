// A layer in two phases, both by tiles of tokens: the projections to queries, keys and values; then, when those of all
// tiles are there, everything else. Between them a tile's features stay in the second-level cache.
#pragma once

#include "attention.h"
#include "feed_forward.h"

namespace {

// The bits of the least float that is infinite, or NaN, when it is rounded to bfloat16.
constexpr int32_t kInfiniteHalf = 0x7f7f8000;

// A part's scratch, cut up.
struct Workspace : WordsScratch {
  float *norm, *context, *hidden, *residual, *attention;

  Workspace(const EncoderLayer& a, float* scratch) {
    auto take = [&](int64_t rows) {
      float* at = scratch;
      scratch += (rows * a.T + 15) / 16 * 16;
      return at;
    };
    norm = take(a.H);
    residual = take(a.H);
    context = take(a.value.N);
    hidden = take(a.fc1.N);
    words = take(a.widest() + 16);
    scales = take(1);
    inverse = take(1);
    attention = scratch;
  }
};

// Queries or keys, as A multiplies them.
template <class D, class A, int R>
void project_to_operand(const Projection& p, const Words& x, int T, float* to) {
  if constexpr (A::kUnit == 2)
    project_to_pairs<D, R>(p, x, T, to, [](Vec v) { return v; });
  else
    project_to_rows<D, R>(p, x, T, to, [](Vec v, int64_t, int) { return v; });
}

template <class D, class A, int R>
void project_tile(const EncoderLayer& a, int64_t tile, Workspace& w) {
  const float* x = a.x + tile * a.H * a.T;
  if (a.heads == 0) return;
  if (a.pre_norm) {
    layer_norm(x, a.H, a.T, a.norm1_weight, a.norm1_bias, a.eps, w.norm);
    x = w.norm;
  }
  Words words = words_for<D>(a.query, x, a.T, w);
  project_to_operand<D, A, R>(a.query, words, a.T, a.queries + tile * a.query.N * a.T);
  if (takes_singles<D>(a.key) != takes_singles<D>(a.query)) words = words_for<D>(a.key, x, a.T, w);
  project_to_operand<D, A, R>(a.key, words, a.T, a.keys + tile * a.key.N * a.T);
  if (takes_singles<D>(a.value) != takes_singles<D>(a.key)) words = words_for<D>(a.value, x, a.T, w);
  typename A::Element* values = (typename A::Element*)(a.values + tile * a.value.N * a.T);
  VecI most = {};
  project_to_rows<D, R>(a.value, words, a.T, values, [&](Vec v, int64_t, int) __attribute__((always_inline)) {
    const VecI magnitude = (VecI)v & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
    return v;
  });
  a.strange[tile] = 0;
  for (int i = 0; i < kLanes; i++) a.strange[tile] |= most[i] >= kInfiniteHalf;
}

// to = residual + p(x).
template <class D, int R>
void project_and_add(const Projection& p, const Words& x, const float* residual, int T, float* to) {
  project_to_rows<D, R>(p, x, T, to, [&](Vec v, int64_t row, int t) __attribute__((always_inline)) {
    return v + load(residual + row * T + t);
  });
}

template <class D, class A, int R>
void rest_of_tile(const EncoderLayer& a, int64_t tile, Workspace& w) {
  const int T = a.T;
  const float* x = a.x + tile * a.H * T;
  float* y = a.y + tile * a.H * T;
  for (int t = 0; t < T && a.heads > 0; t += R * kLanes) {
    const Queries<R> queries = queries_of<R>(a.spans, tile * T + t);
    for (int head = 0; head < a.heads; head++)
      attend<A, R>(a, queries, tile, t, head, w.context + a.value_rows[head] * T, w.attention);
  }
  project_and_add<D, R>(a.output, words_for<D>(a.output, w.context, T, w), x, T, w.residual);
  const float* in = w.residual;
  if (a.pre_norm) {
    layer_norm(w.residual, a.H, T, a.norm2_weight, a.norm2_bias, a.eps, w.norm);
    in = w.norm;
  } else {
    layer_norm(w.residual, a.H, T, a.norm1_weight, a.norm1_bias, a.eps, w.residual);
  }
  const Words hidden = project_and_activate<D, R>(a.fc1, words_for<D>(a.fc1, in, T, w), T, a.activation, a.fc2, w.hidden, w);
  project_and_add<D, R>(a.fc2, hidden, w.residual, T, y);
  if (!a.pre_norm) layer_norm(y, a.H, T, a.norm2_weight, a.norm2_bias, a.eps, y);
}

template <class D, class A, int R>
void phase_of_tiles(const EncoderLayer& a, int phase, int64_t from, int64_t to, Workspace& w) {
  for (int64_t tile = from; tile < to; tile++)
    phase == kEncoderProject ? project_tile<D, A, R>(a, tile, w) : rest_of_tile<D, A, R>(a, tile, w);
}

// D multiplies weights, A attends where bfloat16 is good enough.
template <class D, class A>
void encoder_layer(const EncoderLayer& a, int phase, int part, int parts, float* scratch) {
  if (phase == kEncoderSums) {
    const Projection* const all[] = {&a.query, &a.key, &a.value, &a.output, &a.fc1, &a.fc2};
    for (const Projection* p : all) sum_share<D>(*p, part, parts);
    return;
  }
  Workspace w(a, scratch);
  const int64_t from = a.tiles * part / parts, to = a.tiles * (part + 1) / parts;
  constexpr int kWide = 2;
  if constexpr (kWide * kLanes > 16)
    if (a.T == 16) return a.half_attention ? phase_of_tiles<D, A, 1>(a, phase, from, to, w) : phase_of_tiles<D, F32, 1>(a, phase, from, to, w);
  a.half_attention ? phase_of_tiles<D, A, kWide>(a, phase, from, to, w) : phase_of_tiles<D, F32, kWide>(a, phase, from, to, w);
}

// bfloat16 weights: widened, unless the activations may be bfloat16 as well and blocks have an even number of inputs, or
// one.
[[maybe_unused]] void encoder_layer_bfloat(const EncoderLayer& a, int phase, int part, int parts, float* scratch) {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  bool pairs = a.half;
  const Projection* const all[] = {&a.query, &a.key, &a.value, &a.output, &a.fc1, &a.fc2};
  for (const Projection* p : all) pairs = pairs && takes_pairs(*p);
  if (pairs) return encoder_layer<Bf16Dot, HalfAttention>(a, phase, part, parts, scratch);
#endif
  encoder_layer<Bf16Wide, HalfAttention>(a, phase, part, parts, scratch);
}

template <template <class> class I8>
void encoder_layer_int8(const EncoderLayer& a, int phase, int part, int parts, float* scratch) {
  encoder_layer<I8<float>, HalfAttention>(a, phase, part, parts, scratch);
}

template <class E>
void pack_share(const EncoderRows& a, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i++)
    pack_rows<Wide<E>>((const E*)a.x, a.H, a.source + i * a.T, a.H, a.T, a.stream + i * a.H * a.T);
}

template <class E>
void unpack_share(const EncoderRows& a, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i++)
    unpack_rows(a.stream + i * a.H * a.T, a.source + i * a.T, a.H, a.T, (E*)a.y, a.H);
}

[[maybe_unused]] void encoder_pack(const EncoderRows& a, int part, int parts, float*) {
  const int64_t from = a.tiles * part / parts, to = a.tiles * (part + 1) / parts;
  a.half ? pack_share<bf16>(a, from, to) : pack_share<float>(a, from, to);
}

[[maybe_unused]] void encoder_unpack(const EncoderRows& a, int part, int parts, float*) {
  const int64_t from = a.tiles * part / parts, to = a.tiles * (part + 1) / parts;
  a.half ? unpack_share<bf16>(a, from, to) : unpack_share<float>(a, from, to);
}

}  // namespace

#define SNLP_ENCODER_LAYER(name, ...)                                                                    \
  void encoder_layer_##name(const EncoderLayer& a, int phase, int part, int parts, float* scratch) {     \
    __VA_ARGS__(a, phase, part, parts, scratch);                                                         \
  }

#define SNLP_ENCODER_ROWS(name)                                                                          \
  void encoder_pack_##name(const EncoderRows& a, int part, int parts, float* s) { encoder_pack(a, part, parts, s); } \
  void encoder_unpack_##name(const EncoderRows& a, int part, int parts, float* s) { encoder_unpack(a, part, parts, s); }

// Attention of one head for the tokens of a tile, with lanes over queries: scores, softmax and context need no
// transpose and no sum across lanes. Keys are worked off in chunks with a running maximum (Milakov and Gimelshein
// 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), and scores are in units of ln 2, for exp2.
//
// D says how queries, keys, probabilities and values are multiplied: F32, or Bf16Dot. Queries and keys lie as
// [dimension / kUnit][T] words, values as [dimension][T] elements.
#pragma once

#include "rows.h"

namespace {

// The dtype in which bfloat16 attends.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef Bf16Dot HalfAttention;
#else
typedef F32 HalfAttention;
#endif

constexpr int kKeyBlock = kRegisters == 32 ? 8 : 4;  // keys, or dimensions, whose sums are in registers
constexpr int kChunk = 128;                          // keys between two looks at the maximum
constexpr float kLog2e = 1.44269504089f;
constexpr float kMasked = -__builtin_inff();
constexpr float kLowest = -1e30f;  // finite, so that kMasked - kLowest is no NaN

// 2^x, and exactly 0 below 2^-126: a key that is not attended to adds nothing, and no product with it is subnormal,
// which costs Intel a hundred cycles.
SNLP_INLINE Vec probability(Vec x) {
  const Vec p = exp2_below(x);
  return x < splat(-126.0f) ? Vec{} : p;
}

// What a head's attention to a chunk of keys needs to know of the queries.
template <int R>
struct Queries {
  static constexpr int W = R * kLanes;
  VecI first[R], last[R];  // keys that they attend to
  int64_t all_from, all_to;  // keys that all attend to
  int64_t any_from, any_to;  // keys that any attends to
};

template <int R>
Queries<R> queries_of(const Spans& spans, int64_t token0) {
  Queries<R> q;
  q.all_from = q.any_to = 0;
  q.all_to = q.any_from = INT64_MAX;
  for (int i = 0; i < q.W; i++) {
    const int32_t first = spans.first[token0 + i], last = spans.last[token0 + i];
    q.first[i / kLanes][i % kLanes] = first;
    q.last[i / kLanes][i % kLanes] = last;
    if (first > q.all_from) q.all_from = first;
    if (last > q.any_to) q.any_to = last;
    q.all_to = smaller(q.all_to, last);
    q.any_from = smaller(q.any_from, first);
  }
  return q;
}

SNLP_INLINE bool is_finite(float value) { return value - value == 0; }

SNLP_INLINE Vec gather(const float* table, VecI at) {
#if defined(__AVX512F__)
  return (Vec)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
  Vec values;
  for (int i = 0; i < kLanes; i++) values[i] = table[at[i]];
  return values;
#endif
}

// The bias of kLanes queries (from packed token on) for a key, by their positions within their sequences.
SNLP_INLINE Vec position_bias(const AttentionTiles& a, int head, int64_t token, int64_t key) {
  const VecI q = load_lanes<int32_t, kLanes>(a.positions + token), k = VecI{} + a.positions[key];
  const int32_t side = (int32_t)a.side;
  const VecI inside = (k >= 0) & (k < side) & (q >= 0) & (q < side);
  const Vec bias = gather(a.position_bias + head * a.side * a.side, (q * side + k) & inside);
  return (Vec)((VecI)bias & inside);
}

// put(j, r, sum) for each key j of a tile and vector r of W queries: the sum of their products over the dimensions.
template <class D, int R, class Put>
SNLP_INLINE void multiply_keys(const float* query, const float* key, int T, int64_t dimensions, Put put) {
  constexpr int B = kKeyBlock;
  for (int j0 = 0; j0 < T; j0 += B) {
    Vec sum[B][R] = {};
    const float *x = query, *w = key + j0;
    for (int64_t d = 0; d < dimensions; d++, x += T, w += T) {
      Vec xv[R];
      SNLP_UNROLL for (int r = 0; r < R; r++) xv[r] = load(x + r * kLanes);
      SNLP_UNROLL for (int j = 0; j < B; j++) {
        const Vec weight = splat_word(w + j);
        SNLP_UNROLL for (int r = 0; r < R; r++) sum[j][r] = D::template dot<kLanes>(sum[j][r], xv[r], weight);
      }
    }
    SNLP_UNROLL for (int j = 0; j < B; j++)
      SNLP_UNROLL for (int r = 0; r < R; r++) put(j0 + j, r, sum[j][r]);
  }
}

// scores[T][W] of the queries with all keys of one tile; the largest so far is updated.
template <class D, int R>
SNLP_INLINE void score_tile(
    const AttentionTiles& a, int head, const Queries<R>& q, int64_t token0, const float* query, const float* key,
    int64_t dimensions, int64_t key0, float* scores, Vec largest[R]) {
  constexpr int W = R * kLanes;
  const bool masked = key0 < q.all_from || key0 + a.T > q.all_to;
  multiply_keys<D, R>(query, key, a.T, dimensions, [&](int j, int r, Vec sum) __attribute__((always_inline)) {
    const int32_t at = (int32_t)(key0 + j);
    Vec s = sum * (a.scale * kLog2e);
    if (a.position_bias) s += position_bias(a, head, token0 + r * kLanes, at) * kLog2e;
    if (masked) s = ((q.first[r] <= at) & (q.last[r] > at)) ? s : splat(kMasked);
    largest[r] = max(largest[r], s);
    store(scores + j * W + r * kLanes, s);
  });
}

// context[B][W] += values[B][keys of one tile] times probabilities, which are words [T / kUnit][W].
template <class D, int R, int B>
SNLP_INLINE void add_values(const float* words, const typename D::Element* values, int T, float* context) {
  constexpr int W = R * kLanes;
  Vec sum[B][R];
  SNLP_UNROLL for (int j = 0; j < B; j++)
    SNLP_UNROLL for (int r = 0; r < R; r++) sum[j][r] = load(context + j * W + r * kLanes);
  for (int key = 0; key < T; key += D::kUnit, words += W) {
    Vec xv[R];
    SNLP_UNROLL for (int r = 0; r < R; r++) xv[r] = load(words + r * kLanes);
    SNLP_UNROLL for (int j = 0; j < B; j++) {
      const Vec weight = splat_word(values + j * T + key);
      SNLP_UNROLL for (int r = 0; r < R; r++) sum[j][r] = D::template dot<kLanes>(sum[j][r], xv[r], weight);
    }
  }
  SNLP_UNROLL for (int j = 0; j < B; j++)
    SNLP_UNROLL for (int r = 0; r < R; r++) store(context + j * W + r * kLanes, sum[j][r]);
}

// Softmax and context of W queries over chunks of keys, each weighed against the largest score so far.
template <class D, int R>
struct Softmax {
  static constexpr int W = R * kLanes;
  typedef typename D::Element E;
  float* context;  // [width][W]
  int64_t width;
  Vec largest[R], total[R];
  bool first = true;

  inline __attribute__((always_inline)) Softmax(float* context, int64_t width) : context(context), width(width) {
    for (int64_t i = 0; i < width * W; i += kLanes) store(context + i, Vec{});
    for (int r = 0; r < R; r++) largest[r] = splat(kLowest), total[r] = Vec{};
  }

  // scores[keys][W] become probabilities, as words [keys / kUnit][W]; `before` is what was largest without them.
  inline __attribute__((always_inline)) void weigh(float* scores, int64_t keys, const Vec before[R]) {
    Vec shrink[R];
    for (int r = 0; r < R; r++) {
      shrink[r] = probability(before[r] - largest[r]);
      total[r] *= shrink[r];
    }
    if (!first)
      for (int64_t d = 0; d < width; d++)
        for (int r = 0; r < R; r++) store(context + d * W + r * kLanes, load(context + d * W + r * kLanes) * shrink[r]);
    first = false;
    for (int64_t key = 0; key < keys; key += D::kUnit)
      for (int r = 0; r < R; r++) {
        float* at = scores + key * W + r * kLanes;
        for (int u = 0; u < D::kUnit; u++) {
          const Vec p = probability(load(at + u * W) - largest[r]);
          total[r] += p;
          store(at + u * W, p);
        }
        if constexpr (D::kUnit == 2) store(scores + key / 2 * W + r * kLanes, pair_words(load(at), load(at + W)));
      }
  }

  // context += probabilities times values[width][T] of one tile of keys.
  inline __attribute__((always_inline)) void add(const float* words, const E* values, int T) {
    int64_t d = 0;
    for (; d + kKeyBlock <= width; d += kKeyBlock)
      add_values<D, R, kKeyBlock>(words, values + d * T, T, context + d * W);
    for (; d < width; d++) add_values<D, R, 1>(words, values + d * T, T, context + d * W);
  }
};

// Softmax::add for a tile with values that are not finite: only queries that attend to their keys meet them, since 0 times
// NaN is NaN.
template <class D, int R>
__attribute__((noinline)) void add_apart(
    const Softmax<D, R>& softmax, const Queries<R>& q, int64_t key0, const float* words, const typename D::Element* values,
    int T) {
  constexpr int W = R * kLanes;
  for (int64_t d = 0; d < softmax.width; d++, values += T) {
    float* context = softmax.context + d * W;
    typename D::Element finite[32];
    for (int key = 0; key < T; key++) finite[key] = is_finite(to_float(values[key])) ? values[key] : typename D::Element{};
    add_values<D, R, 1>(words, finite, T, context);
    for (int key = 0; key < T; key++) {
      const float value = to_float(values[key]);
      if (is_finite(value)) continue;
      const int32_t at = (int32_t)(key0 + key);
      for (int r = 0; r < R; r++) {
        const Vec sum = load(context + r * kLanes);
        store(context + r * kLanes, ((q.first[r] <= at) & (q.last[r] > at)) ? sum + value : sum);
      }
    }
  }
}

// out[value dimensions][T] at the W tokens from t on = attention of one head. scratch: W * (kChunk + value
// dimensions) words.
template <class D, int R>
void attend(const AttentionTiles& a, const Queries<R>& q, int64_t tile, int t, int head, float* out, float* scratch) {
  constexpr int W = R * kLanes;
  typedef typename D::Element E;
  const int T = a.T;
  const int64_t query_size = a.query_rows[a.heads], value_size = a.value_rows[a.heads];
  const int64_t q0 = a.query_rows[head] / D::kUnit, dimensions = (a.query_rows[head + 1] + D::kUnit - 1) / D::kUnit - q0;
  const int64_t v0 = a.value_rows[head], width = a.value_rows[head + 1] - v0;
  float* scores = scratch;
  Softmax<D, R> softmax(scratch + kChunk * W, width);
  const float* query = a.queries + (tile * query_size + q0) * T + t;
  const int64_t tile_from = q.any_from / T, tile_to = (q.any_to + T - 1) / T;
  for (int64_t from = tile_from; from < tile_to; from += kChunk / T) {
    const int64_t to = smaller(from + kChunk / T, tile_to);
    Vec before[R];
    for (int r = 0; r < R; r++) before[r] = softmax.largest[r];
    for (int64_t i = from; i < to; i++)
      score_tile<D, R>(
          a, head, q, tile * T + t, query, a.keys + (i * query_size + q0) * T, dimensions, i * T, scores + (i - from) * T * W,
          softmax.largest);
    softmax.weigh(scores, (to - from) * T, before);
    for (int64_t i = from; i < to; i++) {
      const float* words = scores + (i - from) * T / D::kUnit * W;
      const E* values = (const E*)(a.values + i * value_size * T) + v0 * T;
      const bool shared = i * T < q.all_from || (i + 1) * T > q.all_to;
      if (shared && a.strange && a.strange[i])
        add_apart<D, R>(softmax, q, i * T, words, values, T);
      else
        softmax.add(words, values, T);
    }
  }
  Vec inverse[R];
  for (int r = 0; r < R; r++) inverse[r] = 1.0f / softmax.total[r];
  for (int64_t d = 0; d < width; d++)
    for (int r = 0; r < R; r++)
      store(out + d * T + t + r * kLanes, load(softmax.context + d * W + r * kLanes) * inverse[r]);
}

}  // namespace

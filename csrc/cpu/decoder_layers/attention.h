// Attention of new tokens over the cache, a pair of token and query head at a time.
#pragma once

#include "../vec_math.h"
#include "decoder_layers.h"

namespace {

SNLP_INLINE float add_lanes(Vec v) { return add_segments<kLanes>(v, kLanes)[0]; }

SNLP_INLINE Vec keep_first(Vec v, int64_t count) {
  float lanes[kLanes];
  store(lanes, v);
  return load_first(lanes, count);
}

template <class E>
SNLP_INLINE E* cached(const DecoderLayers& a, int layer, bool value, int64_t sequence, int64_t kv_head) {
  const int64_t block = (value * a.layer_count + layer) * a.batch + sequence;
  return (E*)a.cache + (block * a.kv_heads + kv_head) * a.capacity * a.head_dim;
}

// out = x rotated to the token's position (halves of the head are the coordinates), times scale.
template <class E, class Out>
SNLP_INLINE void rotate(const DecoderLayers& a, const E* x, int64_t token, float scale, Out* out) {
  const int64_t D = a.head_dim;
  if (!a.rope) {
    for (int64_t d = 0; d < D; d += kLanes)
      store_first(out + d, load_first(x + d, smaller(kLanes, D - d)) * scale, smaller(kLanes, D - d));
    return;
  }
  const int64_t half = D / 2;
  const float *cos = a.rope + a.positions[token] * D, *sin = cos + half;
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t wide = smaller(kLanes, half - d);
    const Vec c = load_first(cos + d, wide) * scale, s = load_first(sin + d, wide) * scale;
    const Vec first = load_first(x + d, wide), second = load_first(x + half + d, wide);
    store_first(out + d, first * c - second * s, wide);
    store_first(out + half + d, second * c + first * s, wide);
  }
}

// Keys and values of the new tokens.
template <class E>
void append(const DecoderLayers& a, int layer, int part, int parts) {
  const int64_t D = a.head_dim, units = a.tokens() * a.kv_heads;
  for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
    const int64_t token = unit / a.kv_heads, head = unit % a.kv_heads;
    const int64_t sequence = token / a.length, at = (a.past + token % a.length) * D;
    const E* key = (const E*)a.qkv[1] + token * a.qkv_stride[1] + head * D;
    const E* value = (const E*)a.qkv[2] + token * a.qkv_stride[2] + head * D;
    rotate(a, key, token, 1, cached<E>(a, layer, false, sequence, head) + at);
    memcpy(cached<E>(a, layer, true, sequence, head) + at, value, D * sizeof(E));
  }
}

// scores[p] = query . keys[p] + mask[p] for p < count, -inf up to the next multiple of kLanes; returns the largest.
template <class E, bool Whole>
SNLP_INLINE float score(const float* query, const E* keys, const float* mask, int64_t count, int64_t D, float* scores) {
  Vec most = splat(-__builtin_inff());
  for (int64_t p = 0; p < count; p += kLanes) {
    const int64_t wide = smaller(kLanes, count - p);
    Vec r[kLanes] = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const Vec q = load(query + d);
      const E* key = keys + p * D + d;
      if (Whole && wide == kLanes) {
        SNLP_UNROLL for (int i = 0; i < kLanes; i++) r[i] += q * load(key + i * D);
      } else {
        for (int i = 0; i < wide; i++) r[i] += q * load_first(key + i * D, smaller(kLanes, D - d));
      }
    }
    transpose(r);
    SNLP_UNROLL for (int step = kLanes / 2; step > 0; step /= 2)
      for (int i = 0; i < step; i++) r[i] += r[i + step];
    Vec sums = mask ? r[0] + load_first(mask + p, wide) : r[0];
    store(scores + p, sums);
    for (int64_t i = wide; i < kLanes; i++) scores[p + i] = -__builtin_inff();
    most = max(load(scores + p), most);
  }
  float largest = most[0];
  for (int i = 1; i < kLanes; i++) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

// out[N vectors] = sum over positions of weights[p] * values[p].
template <class E, bool Whole, int N>
SNLP_INLINE void mix(const float* weights, const E* values, int64_t count, int64_t D, int64_t left, float factor, E* out) {
  constexpr int U = 8 / N;  // independent sums, to cover the latency
  Vec sum[U][N] = {};
  auto add = [&](int u, int64_t p) __attribute__((always_inline)) {
    const Vec weight = splat(weights[p]);
    SNLP_UNROLL for (int n = 0; n < N; n++)
      sum[u][n] += weight * (Whole ? load(values + p * D + n * kLanes)
                                   : load_first(values + p * D + n * kLanes, left - n * kLanes));
  };
  int64_t p = 0;
  for (; p + U <= count; p += U)
    SNLP_UNROLL for (int u = 0; u < U; u++) add(u, p + u);
  for (; p < count; p++) add(0, p);
  SNLP_UNROLL for (int n = 0; n < N; n++) {
    for (int u = 1; u < U; u++) sum[0][n] += sum[u][n];
    store_first(out + n * kLanes, sum[0][n] * factor, left - n * kLanes);
  }
}

template <class E, bool Whole>
void attend_one(
    const float* query, const E* keys, const E* values, const float* mask, int64_t count, int64_t D, float* scores, E* out) {
  const float most = score<E, Whole>(query, keys, mask, count, D, scores);
  if (mask && most == -__builtin_inff()) return (void)memset(out, 0, D * sizeof(E));
  Vec total = {};
  for (int64_t p = 0; p < count; p += kLanes) {
    const Vec below = load(scores + p) - most;
    const Vec weight = below < splat(-87.3f) ? Vec{} : exp(below);  // else products with it may be subnormal
    store(scores + p, weight);
    total += weight;
  }
  const float factor = 1 / add_lanes(total);
  for (int64_t d = 0; d < D;) {
    const int64_t left = D - d, vectors = (left + kLanes - 1) / kLanes;
    if (vectors >= 4) {
      mix<E, Whole, 4>(scores, values + d, count, D, left, factor, out + d);
      d += 4 * kLanes;
    } else if (vectors >= 2) {
      mix<E, Whole, 2>(scores, values + d, count, D, left, factor, out + d);
      d += 2 * kLanes;
    } else {
      mix<E, Whole, 1>(scores, values + d, count, D, left, factor, out + d);
      d += kLanes;
    }
  }
}

template <class E>
void attend(const DecoderLayers& a, int layer, int part, int parts, float* scratch) {
  const int64_t D = a.head_dim, all = a.past + a.length, group = a.heads / a.kv_heads;
  float *query = scratch, *scores = scratch + (D + 15) / 16 * 16;
  memset(query, 0, (D + 15) / 16 * 16 * sizeof(float));
  for (int64_t unit = part; unit < a.tokens() * a.heads; unit += parts) {  // later tokens see more: deal them out
    const int64_t token = unit / a.heads, head = unit % a.heads, sequence = token / a.length;
    const E* keys = cached<E>(a, layer, false, sequence, head / group);
    const E* values = cached<E>(a, layer, true, sequence, head / group);
    const float* mask = a.mask ? a.mask + sequence * all : nullptr;
    const int64_t count = a.past + token % a.length + 1;
    rotate(a, (const E*)a.qkv[0] + token * a.qkv_stride[0] + head * D, token, a.scale, query);
    E* out = (E*)a.attended + unit * D;
    if (D % kLanes == 0)
      attend_one<E, true>(query, keys, values, mask, count, D, scores, out);
    else
      attend_one<E, false>(query, keys, values, mask, count, D, scores, out);
  }
}

}  // namespace

// Feature-major rows of a tile: [features][T] floats, lanes over tokens. What a layer does to them beside
// multiplying, and how they become the words that a projection multiplies.
#pragma once

#include "../tile.h"
#include "encoder_layer.h"

namespace {

SNLP_INLINE Vec square_root(Vec v) {
  for (int i = 0; i < kLanes; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// to[H][T] = LayerNorm(from[H][T]) over the features of each token; may be in place.
[[maybe_unused]] void layer_norm(const float* from, int64_t H, int T, const float* weight, const float* bias, float eps, float* to) {
  for (int t = 0; t < T; t += kLanes) {
    Vec sum[4] = {};
    int64_t h = 0;
    for (; h + 4 <= H; h += 4)
      for (int u = 0; u < 4; u++) sum[u] += load(from + (h + u) * T + t);
    for (; h < H; h++) sum[0] += load(from + h * T + t);
    const Vec mean = (sum[0] + sum[1] + sum[2] + sum[3]) * (1.0f / H);
    Vec squares[4] = {};
    for (h = 0; h + 4 <= H; h += 4)
      for (int u = 0; u < 4; u++) {
        const Vec d = load(from + (h + u) * T + t) - mean;
        squares[u] += d * d;
      }
    for (; h < H; h++) {
      const Vec d = load(from + h * T + t) - mean;
      squares[0] += d * d;
    }
    const Vec variance = (squares[0] + squares[1] + squares[2] + squares[3]) * (1.0f / H);
    const Vec inverse = 1.0f / square_root(variance + eps), shift = -mean * inverse;
    for (h = 0; h < H; h++) store(to + h * T + t, (load(from + h * T + t) * inverse + shift) * weight[h] + bias[h]);
  }
}

// The scale of each token of rows [K][T] that maps its largest magnitude to 127, and what to multiply by.
[[maybe_unused]] void token_scales(const float* rows, int64_t K, int T, float* scales, float* inverse) {
  for (int t = 0; t < T; t += kLanes) {
    VecI most = {};
    for (int64_t k = 0; k < K; k++) {
      const VecI bits = (VecI)load(rows + k * T + t) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    const Vec scale = most == 0 ? splat(1.0f) : (Vec)most * (1.0f / 127);
    store(scales + t, scale);
    store(inverse + t, 1.0f / scale);
  }
}

// How the rows of a tile are given to a projection with weights of dtype D:
//   words    [K / kUnit][T]: kUnit features of a token in a word
//   singles  [K][16]: a feature of 32 tokens in a row, 16 bits each, in the order that pairs.h wants

// Words of two bfloat16.
SNLP_INLINE Vec pair_words(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, both);
#else
  bf16 halves[2][kLanes];
  store(halves[0], low);
  store(halves[1], high);
  return (Vec)((WordsL<kLanes>)load(halves[0]) >> 16 | (WordsL<kLanes>)load(halves[1]));
#endif
}

#if defined(__AVX512BF16__)
SNLP_INLINE void store_single(float* to, Vec first, Vec second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  store(to, (Vec)_mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), both));
}
#endif

// Words of kUnit int8 or int16 from rows [kUnit][T] times `inverse`, of which `left` exist. |row * inverse| <= 127, so
// adding 1.5 * 2^23 leaves the rounded number in the low bits.
template <class D>
SNLP_INLINE Vec quantized_words(const float* rows, int T, int64_t left, Vec inverse) {
  constexpr int bits = 32 / D::kUnit;
  constexpr int32_t mask = bits == 32 ? -1 : (1 << (bits & 31)) - 1;
  VecI word = {};
  SNLP_UNROLL for (int u = 0; u < D::kUnit; u++) {
    const Vec v = u < left ? load(rows + u * T) : Vec{};
    const VecI q = (VecI)(v * inverse + (12582912.0f + D::kShift)) - (bits == 32 ? 0x4b400000 : 0);
    word |= (q & mask) << bits * u;
  }
  return (Vec)word;
}

template <class D>
void rows_to_words(const float* rows, int64_t K, int T, const float* inverse, float* words) {
  for (int64_t k = 0; k < K; k += D::kUnit)
    for (int t = 0; t < T; t += kLanes) {
      const float* at = rows + k * T + t;
      if constexpr (D::kQuantized)
        store(words + k / D::kUnit * T + t, quantized_words<D>(at, T, K - k, load(inverse + t)));
      else
        store(words + k / D::kUnit * T + t, pair_words(load(at), k + 1 < K ? load(at + T) : Vec{}));
    }
}

#if defined(__AVX512BF16__)
[[maybe_unused]] void rows_to_singles(const float* rows, int64_t K, int T, float* words) {
  for (int64_t k = 0; k < K; k++)
    store_single(words + k * 16, load(rows + k * T), T > 16 ? load(rows + k * T + 16) : Vec{});
}
#endif

// Features [0, K) of the tokens of a tile as words [K / kUnit][T], 0 where there is no token: token t is row source[t] of
// x, whose rows lie ld apart, or none if that is negative. To bfloat16, words are floats and rounded; int8 is x times
// `inverse` of its token.
template <class D, class To>
void pack_rows(
    const typename D::Element* x, int64_t ld, const int32_t* source, int64_t K, int T, To* tile, const float* inverse = nullptr) {
  const int32_t zeros = (int32_t)(D::kShift * 0x01010101u);
  const int64_t words = (K + D::kUnit - 1) / D::kUnit;
  for (int t = 0; t < T; t += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++)
        r[i] = source[t + i] < 0 ? splat_word(&zeros)
                                 : token_words<D>(x + source[t + i] * ld, w, K, D::kQuantized ? inverse[t + i] : 1);
      transpose(r);
      for (int i = 0; i < smaller(kLanes, words - w); i++) store(tile + (w + i) * T + t, r[i]);
    }
}

// Rows [H][T] of a tile back to features [0, H) of the rows source[t] of y.
template <class E>
void unpack_rows(const float* tile, const int32_t* source, int64_t H, int T, E* y, int64_t ld) {
  for (int t = 0; t < T; t += kLanes)
    for (int64_t h = 0; h < H; h += kLanes) {
      const int64_t wide = smaller(kLanes, H - h);
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = i < wide ? load(tile + (h + i) * T + t) : Vec{};
      transpose(r);
      for (int i = 0; i < kLanes; i++)
        if (source[t + i] >= 0) store_first(y + source[t + i] * ld + h, r[i], wide);
    }
}

}  // namespace

// What linear ops share: tiles of x with lanes over tokens, and the way from sums to y.
//
// `Args` is the argument struct of an op, with M, N, K, bias, residual, y, activation and, for int8, scales and
// input_scale named as in BsrLinear.
#pragma once

#include "dtypes.h"

namespace {

constexpr int kGroup = 16;  // output rows that the epilogue transposes and stores together

// What one part knows of its tile of tokens.
struct Tile {
  float* words;       // [K / kUnit][T]
  int64_t token0, tokens;
  float* scales;      // int8: of each token
  const int32_t* row_sums;  // int8: kShift times the sum of each row's weights
};

// The largest magnitude among K values, NaN if one is: as bits, NaN sorts above infinity.
template <class E>
SNLP_INLINE float largest(const E* x, int64_t K) {
  VecI most = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    const VecI bits = (VecI)load_first(x + k, smaller(kLanes, K - k)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits = most[i] > bits ? most[i] : bits;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// The scale that maps a token's largest magnitude to 127, or the given one; 1 for a token of zeros.
template <class E, class Args>
SNLP_INLINE float token_scale(const Args& a, const E* x) {
  if (a.input_scale > 0) return a.input_scale;
  const float most = largest(x, a.K);
  return most == 0 ? 1.0f : most / 127;
}

// kLanes words of one token, zero beyond K.
template <class D>
SNLP_INLINE Vec token_words(const typename D::Element* x, int64_t word, int64_t K, float inverse) {
  const int64_t k = word * D::kUnit, left = K - k;
  if (left >= kLanes * D::kUnit) return D::template words<kLanes>(x + k, inverse);
  typename D::Element padded[kLanes * D::kUnit] = {};
  memcpy(padded, x + k, left * sizeof *padded);
  return D::template words<kLanes>(padded, inverse);
}

// tile.words[word][T] of tokens of x (row stride ld), zero beyond the last token.
template <class D, int R>
void pack_tile(const typename D::Element* x, int64_t ld, int64_t K, int64_t tokens, const float* scales, float* tile) {
  constexpr int T = R * kLanes;
  float inverse[T];
  if (D::kQuantized)
    for (int t = 0; t < tokens; t++) inverse[t] = 1 / scales[t];
  const int64_t words = (K + D::kUnit - 1) / D::kUnit;
  for (int64_t w = 0; w < words; w += kLanes)
    for (int t = 0; t < T; t += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++)
        r[i] = t + i < tokens ? token_words<D>(x + (t + i) * ld, w, K, D::kQuantized ? inverse[t + i] : 1) : Vec{};
      transpose(r);
      for (int i = 0; i < smaller(kLanes, words - w); i++) store(tile + (w + i) * T + t, r[i]);
    }
}

// Pack a tile of the op's x, finding the scales of its tokens for int8.
template <class D, int R, class Args>
void pack_x(const Args& a, Tile& tile) {
  const typename D::Element* x = (const typename D::Element*)a.x + tile.token0 * a.K;
  if constexpr (D::kQuantized)
    for (int64_t t = 0; t < tile.tokens; t++) tile.scales[t] = token_scale(a, x + t * a.K);
  pack_tile<D, R>(x, a.K, a.K, tile.tokens, tile.scales, tile.words);
}

// kLanes outputs of one token, from sums to y.
template <class D, int A, class Args>
SNLP_INLINE void finish(
    const Args& a, Vec sums, Vec scale, Vec bias, int64_t token, int64_t row, int64_t wide) {
  typedef typename D::Element E;
  Vec v = D::template value<kLanes>((typename D::template Sum<kLanes>)sums);
  v = D::kQuantized ? v * scale + bias : v + bias;
  const int64_t at = token * a.N + row;
  if (a.residual) v += load_first((const E*)a.residual + at, wide);
  store_first((E*)a.y + at, activate<A>(v), wide);
}

// y[token][row0 ...] = act(outᵀ + bias) for `rows` of kGroup rows and all tokens of the tile.
template <class D, int R, int A, class Args>
void epilogue(const Args& a, const Tile& tile, const float* out, int64_t row0, int64_t rows) {
  constexpr int T = R * kLanes;
  for (int j = 0; j < rows; j += kLanes) {
    const int64_t wide = smaller(kLanes, rows - j);
    const Vec bias = a.bias ? load_first((const typename D::Element*)a.bias + row0 + j, wide) : Vec{};
    Vec scale = {};
    if constexpr (D::kQuantized) scale = load_first(a.scales + row0 + j, wide);
    for (int64_t t = 0; t < tile.tokens; t += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = load(out + (j + i) * T + t);
      transpose(r);
      const float* token_scales = tile.scales + t;
      const int64_t token = tile.token0 + t;
      if (wide == kLanes && t + kLanes <= tile.tokens) {
        SNLP_UNROLL for (int i = 0; i < kLanes; i++)
          finish<D, A>(a, r[i], D::kQuantized ? scale * token_scales[i] : scale, bias, token + i, row0 + j, kLanes);
      } else {
        for (int64_t i = 0; i < smaller(kLanes, tile.tokens - t); i++)
          finish<D, A>(a, r[i], D::kQuantized ? scale * token_scales[i] : scale, bias, token + i, row0 + j, wide);
      }
    }
  }
}

template <class D, int R, class Args>
SNLP_INLINE void epilogue(const Args& a, const Tile& tile, const float* out, int64_t row0, int64_t rows) {
  switch (a.activation) {
    case kRelu: return epilogue<D, R, kRelu>(a, tile, out, row0, rows);
    case kGelu: return epilogue<D, R, kGelu>(a, tile, out, row0, rows);
    case kGeluTanh: return epilogue<D, R, kGeluTanh>(a, tile, out, row0, rows);
    default: return epilogue<D, R, kNone>(a, tile, out, row0, rows);
  }
}

}  // namespace

// Many tokens: lanes run over tokens. A tile of x is transposed to feature-major [words of K][T], T = R
// vectors of tokens; each block then loads R vectors of x per word and feeds BN outputs from them, one
// broadcast word of weights each. BN * R sums stay in registers, and an index costs one load per block.
#pragma once

#include "dtypes.h"
#include "work.h"

namespace {

constexpr int kGroup = 16;             // output rows that the epilogue transposes and stores together
constexpr int kPrefetchTile = 2048;  // bytes ahead in the weight stream

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
template <class E>
SNLP_INLINE float token_scale(const BsrLinear& a, const E* x) {
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

// row_sums[row] = kShift times the sum of the row's weights, for the rows that work [from, to) touches.
template <class D>
void sum_rows(const BsrLinear& a, int64_t from, int64_t to, int32_t* row_sums) {
  const int64_t per_tile = cost_before(a, a.N), tile = from / per_tile;
  const bool whole = to > (tile + 1) * per_tile;
  const int64_t begin = whole ? 0 : row_at_cost(a, from - tile * per_tile, kGroup);
  const int64_t end = whole ? a.N : row_at_cost(a, to - tile * per_tile, kGroup);
  const int32_t all_shift = (int32_t)(D::kShift * 0x01010101u);
  const int64_t words = a.k / D::kUnit;
  for (int64_t block_row = begin / a.n; block_row * a.n < end; block_row++) {
    const int64_t first = a.crow[block_row], last = a.crow[block_row + 1];
    const typename D::Weight* w = (const typename D::Weight*)a.values + first * a.n * a.k;
    int32_t* sums = row_sums + block_row * a.n;
    constexpr int L = kLanes < 8 ? 4 : 8;
    if (words == 1 && a.n % L == 0) {
      const VecL<L> x = splat_word<L>(&all_shift);
      for (int j = 0; j < a.n; j += L) {
        typename D::template Sum<L> sum = {};
        for (int64_t p = 0; p < last - first; p++)
          sum = D::template dot<L>(sum, x, D::template weights<L>(w + (p * a.n + j) * a.k));
        memcpy(sums + j, &sum, sizeof sum);
      }
    } else {
      memset(sums, 0, a.n * sizeof *sums);
      for (int64_t p = first; p < last; p++)
        for (int j = 0; j < a.n; j++)
          for (int b = 0; b < a.k; b++) sums[j] += D::kShift * *w++;
    }
  }
}

// out[BN][T] = sum over `count` blocks of BN rows of the block times the tile. `values` points at the
// first of the BN rows in the first block; a block is n x k, row-major. N1 and K1: n is N1, k is kUnit.
template <class D, int BN, int R, int N1, bool K1>
SNLP_INLINE void tile_rows(
    const float* tile, const int32_t* col, int64_t count, const typename D::Weight* values, int64_t n_any, int64_t k_any,
    const int32_t* row_sums, float* out) {
  constexpr int T = R * kLanes;
  const int64_t k = K1 ? D::kUnit : k_any, block = (N1 ? N1 : n_any) * k, words = k / D::kUnit;
  typename D::template Sum<kLanes> sum[BN][R] = {};
  if constexpr (D::kShift != 0)
    for (int j = 0; j < BN; j++)
      for (int r = 0; r < R; r++) sum[j][r] -= row_sums[j];
  for (int64_t p = 0; p < count; p++, values += block) {
    const float* x = tile + (int64_t)col[p] * words * T;
    __builtin_prefetch((const char*)values + kPrefetchTile);
    for (int64_t w = 0; w < words; w++, x += T) {
      Vec xv[R];
      SNLP_UNROLL for (int r = 0; r < R; r++) xv[r] = load(x + r * kLanes);
      SNLP_UNROLL for (int j = 0; j < BN; j++) {
        const Vec weight = D::template splat_weight<kLanes>(values + j * k + w * D::kUnit);
        SNLP_UNROLL for (int r = 0; r < R; r++) sum[j][r] = D::template dot<kLanes>(sum[j][r], xv[r], weight);
      }
    }
  }
  for (int j = 0; j < BN; j++)
    for (int r = 0; r < R; r++) store(out + j * T + r * kLanes, (Vec)sum[j][r]);
}

// kLanes outputs of one token, from sums to y.
template <class D, int A>
SNLP_INLINE void finish(
    const BsrLinear& a, Vec sums, Vec scale, Vec bias, int64_t token, int64_t row, int64_t wide) {
  typedef typename D::Element E;
  Vec v = D::template value<kLanes>((typename D::template Sum<kLanes>)sums);
  v = D::kQuantized ? v * scale + bias : v + bias;
  const int64_t at = token * a.N + row;
  if (a.residual) v += load_first((const E*)a.residual + at, wide);
  store_first((E*)a.y + at, activate<A>(v), wide);
}

// y[token][row0 ...] = act(outᵀ + bias) for `rows` of kGroup rows and all tokens of the tile.
template <class D, int R, int A>
void epilogue(const BsrLinear& a, const Tile& tile, const float* out, int64_t row0, int64_t rows) {
  constexpr int T = R * kLanes;
  for (int j = 0; j < rows; j += kLanes) {
    const int64_t wide = smaller(kLanes, rows - j);
    const Vec bias = a.bias ? load_first((const typename D::Element*)a.bias + row0 + j, wide) : Vec{};
    const Vec scale = D::kQuantized ? load_first(a.scales + row0 + j, wide) : Vec{};
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

template <class D, int R>
SNLP_INLINE void epilogue(const BsrLinear& a, const Tile& tile, const float* out, int64_t row0, int64_t rows) {
  switch (a.activation) {
    case kRelu: return epilogue<D, R, kRelu>(a, tile, out, row0, rows);
    case kGelu: return epilogue<D, R, kGelu>(a, tile, out, row0, rows);
    case kGeluTanh: return epilogue<D, R, kGeluTanh>(a, tile, out, row0, rows);
    default: return epilogue<D, R, kNone>(a, tile, out, row0, rows);
  }
}

// One tile times the rows [begin, end), by blocks of N1 (or any) rows, BN at a time.
template <int BN, int N1, bool K1>
struct Blocks {
  template <class D, int R>
  static void pack(const BsrLinear& a, Tile& tile) {
    const typename D::Element* x = (const typename D::Element*)a.x + tile.token0 * a.K;
    if (D::kQuantized)
      for (int64_t t = 0; t < tile.tokens; t++) tile.scales[t] = token_scale(a, x + t * a.K);
    pack_tile<D, R>(x, a.K, a.K, tile.tokens, tile.scales, tile.words);
  }

  template <class D, int R>
  static void multiply(const BsrLinear& a, const Tile& tile, int64_t begin, int64_t end) {
    constexpr int T = R * kLanes;
    alignas(64) float out[kGroup * T];
    for (int64_t row0 = begin; row0 < end; row0 += kGroup) {
      const int64_t rows = smaller(kGroup, end - row0);
      for (int64_t j = 0; j < rows; j += BN) {
        const int64_t block_row = (row0 + j) / a.n, inside = (row0 + j) % a.n;
        const int64_t first = a.crow[block_row], count = a.crow[block_row + 1] - first;
        tile_rows<D, BN, R, N1, K1>(
            tile.words, a.col + first, count, (const typename D::Weight*)a.values + (first * a.n + inside) * a.k, a.n,
            a.k, tile.row_sums + row0 + j, out + j * T);
      }
      epilogue<D, R>(a, tile, out, row0, rows);
    }
  }
};

template <class D, class B, int R>
void one_tile(const BsrLinear& a, Tile& tile, int64_t begin, int64_t end) {
  B::template pack<D, R>(a, tile);
  B::template multiply<D, R>(a, tile, begin, end);
}

// This part's share of (tiles x rows), cut by work. A ragged last tile runs as narrow as it can.
template <class D, class B, int R>
void many_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  constexpr int T = R * kLanes;
  int32_t* row_sums = (int32_t*)scratch;
  Tile tile{scratch + (D::kQuantized ? (a.N + T + 15) / 16 * 16 : 0), 0, 0, scratch + a.N, row_sums};
  const int64_t tiles = (a.M + T - 1) / T, per_tile = cost_before(a, a.N);
  const int64_t from = tiles * per_tile * part / parts, to = tiles * per_tile * (part + 1) / parts;
  if constexpr (D::kShift != 0) sum_rows<D>(a, from, to, row_sums);
  for (int64_t i = from / per_tile; i < tiles && i * per_tile < to; i++) {
    const int64_t begin = row_at_cost(a, from - i * per_tile, kGroup);
    const int64_t end = row_at_cost(a, to - i * per_tile, kGroup);
    if (begin >= end) continue;
    tile.token0 = i * T;
    tile.tokens = smaller(T, a.M - tile.token0);
    if (tile.tokens <= kLanes)
      one_tile<D, B, 1>(a, tile, begin, end);
    else if (tile.tokens <= 2 * kLanes && R > 2)
      one_tile<D, B, 2>(a, tile, begin, end);
    else
      one_tile<D, B, R>(a, tile, begin, end);
  }
}

}  // namespace

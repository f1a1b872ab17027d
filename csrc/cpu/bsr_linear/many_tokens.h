// Many tokens: lanes run over tokens. A tile of x is transposed to feature-major [words of K][T], T = R
// vectors of tokens; each block then loads R vectors of x per word and feeds BN outputs from them, one
// broadcast word of weights each. BN * R sums stay in registers, and an index costs one load per block.
#pragma once

#include "../tile.h"
#include "work.h"

namespace {

constexpr int kPrefetchTile = 2048;  // bytes ahead in the weight stream

// row_sums[row] = kShift times the sum of the row's weights, for all rows of the block rows that [begin, end) touches.
// W: the weights, with crow, values, n and k named as in BsrLinear.
template <class D, class W>
void sum_rows(const W& a, int64_t begin, int64_t end, int32_t* row_sums) {
  constexpr int L = kLanes < 8 ? 4 : 8, U = 4;
  typedef typename D::template Sum<L> Sum;
  const int32_t all_shift = (int32_t)(D::kShift * 0x01010101u);
  const VecL<L> x = splat_word<L>(&all_shift);
  const int64_t words = a.k / D::kUnit;
  for (int64_t block_row = begin / a.n; block_row * a.n < end; block_row++) {
    const int64_t first = a.crow[block_row], last = a.crow[block_row + 1];
    const typename D::Weight* w = (const typename D::Weight*)a.values + first * a.n * a.k;
    int32_t* sums = row_sums + block_row * a.n;
    if (a.n * words % L == 0 && L % words == 0) {
      for (int64_t v = 0; v < a.n * words; v += L) {
        Sum sum[U] = {};
        int64_t p = first;
        const typename D::Weight* at = w + v * D::kUnit;
        for (; p + U <= last; p += U)
          SNLP_UNROLL for (int u = 0; u < U; u++, at += a.n * a.k)
            sum[u] = D::template dot<L>(sum[u], x, D::template weights<L>(at));
        for (; p < last; p++, at += a.n * a.k) sum[0] = D::template dot<L>(sum[0], x, D::template weights<L>(at));
        for (int u = 1; u < U; u++) sum[0] += sum[u];
        int32_t lanes[L];
        store_lanes<int32_t, L>(lanes, add_segments<L>(sum[0], words));
        for (int i = 0; i < L; i += words) *sums++ = lanes[i];
      }
    } else {
      memset(sums, 0, a.n * sizeof *sums);
      for (int64_t p = first; p < last; p++)
        for (int j = 0; j < a.n; j++)
          for (int b = 0; b < a.k; b++) sums[j] += D::kShift * *w++;
    }
  }
}

// out[BN][T] = sum over `count` blocks of BN rows of the block times T tokens of a tile that has `ld` of them. `values`
// points at the first of the BN rows in the first block; a block is n x k, row-major. N1 and K1: n is N1, k is kUnit.
template <class D, int BN, int R, int N1, bool K1>
SNLP_INLINE void tile_rows(
    const float* tile, int64_t ld, const int32_t* col, int64_t count, const typename D::Weight* values, int64_t n_any,
    int64_t k_any, const int32_t* row_sums, float* out) {
  constexpr int T = R * kLanes;
  constexpr int U = BN * R >= 4 ? 1 : 4 / (BN * R);  // independent sums of few rows, to cover the latency
  const int64_t k = K1 ? D::kUnit : k_any, block = (N1 ? N1 : n_any) * k, words = k / D::kUnit;
  typename D::template Sum<kLanes> sum[U][BN][R] = {};
  if constexpr (D::kShift != 0)
    for (int j = 0; j < BN; j++)
      for (int r = 0; r < R; r++) sum[0][j][r] -= row_sums[j];
  auto add = [&](int u, const float* x, const typename D::Weight* w) __attribute__((always_inline)) {
    Vec xv[R];
    SNLP_UNROLL for (int r = 0; r < R; r++) xv[r] = load(x + r * kLanes);
    SNLP_UNROLL for (int j = 0; j < BN; j++) {
      const Vec weight = D::template splat_weight<kLanes>(w + j * k);
      SNLP_UNROLL for (int r = 0; r < R; r++) sum[u][j][r] = D::template dot<kLanes>(sum[u][j][r], xv[r], weight);
    }
  };
  int64_t p = 0;
  if (K1 && U > 1)
    for (; p + U <= count; p += U)
      SNLP_UNROLL for (int u = 0; u < U; u++, values += block) add(u, tile + (int64_t)col[p + u] * ld, values);
  for (; p < count; p++, values += block) {
    const float* x = tile + (int64_t)col[p] * words * ld;
    if (K1) __builtin_prefetch((const char*)values + kPrefetchTile);
    int64_t w = 0;
    if (!K1 && U > 1)
      for (; w + U <= words; w += U)
        SNLP_UNROLL for (int u = 0; u < U; u++, x += ld) add(u, x, values + (w + u) * D::kUnit);
    for (; w < words; w++, x += ld) {
      if (!K1) __builtin_prefetch(values + block + w * BN * D::kUnit);  // the same rows of the next block
      add(0, x, values + w * D::kUnit);
    }
  }
  for (int j = 0; j < BN; j++)
    for (int r = 0; r < R; r++) {
      for (int u = 1; u < U; u++) sum[0][j][r] += sum[u][j][r];
      store(out + j * T + r * kLanes, (Vec)sum[0][j][r]);
    }
}

// Blocks of N1 (or any) rows, BN at a time.
template <int BN, int N1, bool K1>
struct Blocks {
  template <class D, int R>
  static void pack(const BsrLinear& a, Tile& tile) { pack_x<D, R>(a, tile); }
  template <int R>
  static constexpr int64_t ld = R * kLanes;

  // out[rows][T] = `rows` rows from row0 on, at most kGroup, times T tokens of a tile with ld.
  template <class D, int R, class W>
  SNLP_INLINE void group(
      const W& a, const float* words, int64_t ld, const int32_t* row_sums, int64_t row0, int64_t rows, float* out) {
    for (int64_t j = 0; j < rows; j += BN) {
      const int64_t block_row = (row0 + j) / a.n, inside = (row0 + j) % a.n;
      const int64_t first = a.crow[block_row], count = a.crow[block_row + 1] - first;
      tile_rows<D, BN, R, N1, K1>(
          words, ld, a.col + first, count, (const typename D::Weight*)a.values + (first * a.n + inside) * a.k, a.n, a.k,
          D::kShift ? row_sums + row0 + j : row_sums, out + j * R * kLanes);
    }
  }
};

// One tile times the rows [begin, end), and times the matrices that follow.
template <class D, class B, int R>
void one_tile(const BsrLinear& a, Tile tile, int64_t begin, int64_t end) {
  constexpr int T = R * kLanes;
  alignas(64) float out[kGroup * T];
  B::template pack<D, R>(a, tile);
  for (const BsrLinear* own = &a; own; own = own->next, begin = 0) {
    if (own != &a) end = own->N;
    for (int64_t row0 = begin; row0 < end; row0 += kGroup) {
      const int64_t rows = smaller(kGroup, end - row0);
      B::template group<D, R>(*own, tile.words, B::template ld<R>, tile.row_sums, row0, rows, out);
      epilogue<D, R>(*own, tile, out, row0, rows);
    }
    if (D::kShift) tile.row_sums += own->N;
  }
}

// This part's share of (tiles x rows), cut by work. A ragged last tile runs as narrow as it can.
template <class D, class B, int R>
void many_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  constexpr int T = R * kLanes;
  int32_t* row_sums = (int32_t*)scratch;
  int64_t N = 0;
  for (const BsrLinear* own = &a; own; own = own->next) N += own->N;
  Tile tile{scratch + (D::kQuantized ? (N + T + 15) / 16 * 16 : 0), 0, 0, scratch + N, row_sums};
  const int64_t tiles = (a.M + T - 1) / T, per_tile = cost_before(a, a.N);
  const int64_t from = tiles * per_tile * part / parts, to = tiles * per_tile * (part + 1) / parts;
  if constexpr (D::kShift != 0) {
    const int64_t first = from / per_tile;
    const bool whole = to > (first + 1) * per_tile;
    const int64_t begin = whole ? 0 : row_at_cost(a, from - first * per_tile, kGroup);
    sum_rows<D>(a, begin, whole ? a.N : row_at_cost(a, to - first * per_tile, kGroup), row_sums);
    int32_t* sums = row_sums + a.N;
    for (const BsrLinear* own = a.next; own; sums += own->N, own = own->next) sum_rows<D>(*own, 0, own->N, sums);
  }
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

// Few tokens again and again: the recurrent weights of an LSTM, which every step multiplies by one more state. Their
// block rows are many and short, a dozen blocks each, so that a loop over one of them ends, mispredicted, before it has
// covered its own latency. So they are repacked once, kStrips of them interleaved and all as long as the longest: no
// waste where the list is sorted by length (row swizzle, Gale et al. 2020, arXiv:2006.10901). What then runs is one loop
// over one stream.
//
// A strip is L rows of a block row: a vector of sums. In 4-byte words, every piece padded to kPiece:
//
//   number of groups
//   each group   first row of each strip, or -1; number of rounds
//                kShift: kShift times the sums of the rows, [kStrips][L]
//                rounds x kStrips columns of x, 16 bits each, those of the padding where x has a zero
//                rounds x kStrips x L words of weights
#pragma once

#include "few_tokens.h"

namespace {

constexpr int kStrips = 8;
constexpr int kPiece = 16;
constexpr int kPackedAhead = 512;  // words

SNLP_INLINE int64_t padded(int64_t words) { return (words + kPiece - 1) / kPiece * kPiece; }

// How many words the listed block rows take, which are written unless `packed` is null.
template <class D, int L>
size_t pack_rows(const BsrLinear& a, const int32_t* rows, int64_t count, float* packed) {
  const int64_t vectors = a.n / L, strips = count * vectors, groups = (strips + kStrips - 1) / kStrips;
  if (packed) *(int32_t*)packed = (int32_t)groups;
  int64_t at = kPiece;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t begin = group * kStrips, now = smaller(kStrips, strips - begin);
    int64_t rounds = 0;
    for (int64_t s = begin; s < begin + now; s++) {
      const int32_t row = rows[s / vectors];
      const int64_t blocks = a.crow[row + 1] - a.crow[row];
      rounds = blocks > rounds ? blocks : rounds;
    }
    const int64_t sums_at = at + kPiece, columns_at = sums_at + (D::kShift ? kStrips * L : 0);
    const int64_t weights_at = columns_at + padded(rounds * kStrips / 2), head_at = at;
    at = weights_at + rounds * kStrips * L;
    if (!packed) continue;
    int32_t* head = (int32_t*)(packed + head_at);
    uint16_t* columns = (uint16_t*)(packed + columns_at);
    head[kStrips] = (int32_t)rounds;
    for (int s = 0; s < kStrips; s++) {
      const int32_t row = s < now ? rows[(begin + s) / vectors] : 0;
      const int64_t first = a.crow[row], blocks = s < now ? a.crow[row + 1] - first : 0;
      const int64_t inside = (begin + s) % vectors * L;
      head[s] = s < now ? (int32_t)(row * a.n + inside) : -1;
      const typename D::Weight* from = (const typename D::Weight*)a.values + (first * a.n + inside) * D::kUnit;
      typename D::template Sum<L> sum = {};
      const int32_t all_shift = (int32_t)(D::kShift * 0x01010101u);
      for (int64_t p = 0; p < rounds; p++, from += a.n * D::kUnit) {
        const bool stored = p < blocks;
        const VecL<L> words = stored ? D::template weights<L>(from) : VecL<L>{};
        columns[p * kStrips + s] = (uint16_t)(stored ? a.col[first + p] : a.K / D::kUnit);
        store<L>(packed + weights_at + (p * kStrips + s) * L, words);
        if constexpr (D::kShift != 0) sum = D::template dot<L>(sum, splat_word<L>(&all_shift), words);
      }
      if constexpr (D::kShift != 0) store_lanes<int32_t, L>((int32_t*)(packed + sums_at) + s * L, sum);
    }
  }
  return at;
}

// y of the strips [s, s + S) of a group; x holds MT tokens, M or more.
template <class D, int L, int S, int MT>
SNLP_INLINE void packed_strips(
    const BsrLinear& a, const int32_t* head, const int32_t* row_sums, const uint16_t* columns, const float* weights,
    const float* x, int64_t x_token, const float* scales, int s) {
  typename D::template Sum<L> sum[S][MT] = {};
  const int32_t rounds = head[kStrips];
  columns += s;
  weights += s * L;
  for (int32_t p = 0; p < rounds; p++, columns += kStrips, weights += kStrips * L) {
    for (int line = 0; line < S * L; line += kPiece) __builtin_prefetch(weights + kPackedAhead + line);
    uint64_t four = 0;  // columns: the loads of a round are what takes its time
    SNLP_UNROLL for (int i = 0; i < S; i++, four >>= 16) {
      if (i % 4 == 0) memcpy(&four, columns + i, S < 4 ? 2 * S : 8);
      const uint16_t column = (uint16_t)four;
      const VecL<L> w = load<L>(weights + i * L);
      SNLP_UNROLL for (int m = 0; m < MT; m++)
        sum[i][m] = D::template dot<L>(sum[i][m], splat_word<L>(x + m * x_token + column), w);
    }
  }
  SNLP_UNROLL for (int i = 0; i < S; i++) {
    const int64_t row = head[s + i];
    if (row < 0) continue;
    SNLP_UNROLL for (int m = 0; m < MT; m++) {
      if (m >= a.M) break;
      if constexpr (D::kShift != 0) sum[i][m] -= load_lanes<int32_t, L>(row_sums + (s + i) * L);
      VecL<L> y = D::template value<L>(sum[i][m]);
      if (D::kQuantized) y *= load<L>(a.scales + row) * scales[m];
      store<L>((typename D::Element*)a.y + m * a.N + row, y);
    }
  }
}

// So many strips at a time that kStrips sums are in registers.
template <class D, int L, int MT>
void packed_rows(
    const BsrLinear& a, const float* packed, const float* x, int64_t x_token, const float* scales) {
  const int32_t groups = *(const int32_t*)packed;
  packed += kPiece;
  for (int32_t group = 0; group < groups; group++) {
    const int32_t* head = (const int32_t*)packed;
    const int64_t rounds = head[kStrips];
    packed += kPiece;
    const int32_t* row_sums = (const int32_t*)packed;
    if (D::kShift) packed += kStrips * L;
    const uint16_t* columns = (const uint16_t*)packed;
    packed += padded(rounds * kStrips / 2);
    for (int s = 0; s < kStrips; s += kStrips / MT)
      packed_strips<D, L, kStrips / MT, MT>(a, head, row_sums, columns, packed, x, x_token, scales, s);
    packed += rounds * kStrips * L;
  }
}

template <class D, int L>
void packed_rows(const BsrLinear& a, const float* packed, float* scratch) {
  const int64_t words = a.K / D::kUnit;
  const DecodeShape shape = {1, 1, 0, 1, 0, 1, words + 1};
  float scales[kPackedTokens] = {};
  prepare_tokens<D, L>(a, shape, scratch, scales);
  for (int64_t m = 0; m < kPackedTokens; m++) scratch[m * shape.x_token + words] = 0;
  if (a.M > 2) return packed_rows<D, L, 4>(a, packed, scratch, shape.x_token, scales);
  if (a.M > 1) return packed_rows<D, L, 2>(a, packed, scratch, shape.x_token, scales);
  packed_rows<D, L, 1>(a, packed, scratch, shape.x_token, scales);
}

// Lanes of the strips; 0 for blocks that are not one word wide or have no whole vectors, which are not packed.
template <class D>
int packed_lanes(const BsrLinear& a) {
  if (a.k != D::kUnit || a.K / a.k > 0xffff) return 0;
  const int lanes = decode_lanes<D>(a);
  return lanes >= 4 ? lanes : 0;
}

template <class D>
size_t pack_rows(const BsrLinear& a, const int32_t* rows, int64_t count, float* packed) {
  const int lanes = packed_lanes<D>(a);
  if (lanes == 16) return pack_rows<D, kLanes >= 16 ? 16 : 4>(a, rows, count, packed);
  if (lanes == 8) return pack_rows<D, kLanes >= 8 ? 8 : 4>(a, rows, count, packed);
  return lanes == 4 ? pack_rows<D, 4>(a, rows, count, packed) : 0;
}

template <class D>
void packed_rows(const BsrLinear& a, const float* packed, float* scratch) {
  const int lanes = packed_lanes<D>(a);
  if (lanes == 16) return packed_rows<D, kLanes >= 16 ? 16 : 4>(a, packed, scratch);
  if (lanes == 8) return packed_rows<D, kLanes >= 8 ? 8 : 4>(a, packed, scratch);
  packed_rows<D, 4>(a, packed, scratch);
}

}  // namespace

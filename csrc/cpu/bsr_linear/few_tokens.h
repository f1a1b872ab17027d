// Few tokens (decode): lanes run over the words of a block as they lie in memory, so that weights stream
// once, in order, and set the pace. A vector of L words covers, with `words` = k / kUnit words in a row,
//
//   words == 1   L rows; x is one word in every lane
//   words < L    L / words rows; x is expanded beforehand: each block column of it, repeated to L words
//   otherwise    L words of one row; x as it is
//
// and the lanes that belong to one row are added up at the end of the block row.
#pragma once

#include "many_tokens.h"

namespace {

constexpr int kPrefetchDecode = 4096;  // bytes ahead in the weight stream

// How vectors of L words lie in a block, and what they meet in x.
struct DecodeShape {
  int words;          // in a row of a block
  int segment;        // lanes that belong to one row
  int vectors;        // sums per block row: n * words / L, or n if words > L
  int chunks;         // vectors that add to the same sum within a block
  int64_t stride;     // words between the first vectors of two sums
  int64_t x_column;   // words of the prepared x per block column
  int64_t x_token;    // and per token
};

template <class D, int L>
DecodeShape decode_shape(const BsrLinear& a) {
  const int words = a.k / D::kUnit;
  const int64_t columns = a.K / a.k;
  if (words >= L && words > 1) return {words, L, a.n, words / L, words, words, columns * words};
  const int64_t x_column = words == 1 ? 1 : L;
  return {words, words, a.n * words / L, 1, L, x_column, columns * x_column};
}

// x as words, M tokens of shape.x_token words; returns the scale of each token for int8.
template <class D, int L>
void prepare_tokens(const BsrLinear& a, const DecodeShape& shape, float* prepared, float* scales) {
  typedef typename D::Element E;
  for (int64_t m = 0; m < a.M; m++) {
    const E* x = (const E*)a.x + m * a.K;
    scales[m] = D::kQuantized ? token_scale(a, x) : 1;
    const float inverse = 1 / scales[m];
    float* out = prepared + m * shape.x_token;
    const int64_t words = a.K / D::kUnit;
    const bool expand = shape.words < L && shape.words > 1;
    float* plain = expand ? prepared + a.M * shape.x_token : out;
    int64_t w = 0;
    for (; w + kLanes <= words; w += kLanes) store(plain + w, token_words<D>(x, w, a.K, inverse));
    if (w < words) {
      float tail[kLanes];
      store(tail, token_words<D>(x, w, a.K, inverse));
      memcpy(plain + w, tail, (words - w) * sizeof(float));
    }
    if (expand)
      for (int64_t c = 0; c < words; c += shape.words)
        for (int i = 0; i < L; i += shape.words, out += shape.words)
          memcpy(out, plain + c, shape.words * sizeof(float));
  }
}

// One block row's sums [sum0, sum0 + NA), for MT tokens: out[m][row] in words, stride kOutRows.
constexpr int kOutRows = 128;

template <class D, int L, bool Splat, int NA, int MT>
SNLP_INLINE void decode_rows(
    const BsrLinear& a, const DecodeShape& shape, const float* x, int64_t block_row, int64_t sum0, float* out) {
  typedef typename D::template Sum<L> Sum;
  constexpr int U = NA * MT >= 8 ? 1 : 8 / (NA * MT);  // independent sums, to cover the latency
  constexpr int unit = D::kUnit;
  const int64_t first = a.crow[block_row], last = a.crow[block_row + 1], block = (int64_t)a.n * a.k;
  const typename D::Weight* values = (const typename D::Weight*)a.values + first * block + sum0 * shape.stride * unit;
  Sum sum[U][NA][MT] = {}, shift[U][NA] = {};
  const int32_t all128 = (int32_t)0x80808080;
  const VecL<L> shifted = splat_word<L>(&all128);
  auto add = [&](Sum(&to)[NA][MT], Sum(&to_shift)[NA], const typename D::Weight* w, const float* xp) {
    VecL<L> xv[MT];
    SNLP_UNROLL for (int m = 0; m < MT; m++)
      xv[m] = Splat ? splat_word<L>(xp + m * shape.x_token) : load<L>(xp + m * shape.x_token);
    SNLP_UNROLL for (int i = 0; i < NA; i++) {
      const VecL<L> weight = D::template weights<L>(w + i * shape.stride * unit);
      SNLP_UNROLL for (int m = 0; m < MT; m++) to[i][m] = D::template dot<L>(to[i][m], xv[m], weight);
      if (D::kShift != 0) to_shift[i] = D::template dot<L>(to_shift[i], shifted, weight);
    }
  };
  int64_t p = first;
  if (shape.chunks == 1)
    for (; p + U <= last; p += U)
      SNLP_UNROLL for (int u = 0; u < U; u++, values += block) {
        __builtin_prefetch((const char*)values + kPrefetchDecode);
        add(sum[u], shift[u], values, x + a.col[p + u] * shape.x_column);
      }
  for (; p < last; p++, values += block) {
    __builtin_prefetch((const char*)values + kPrefetchDecode);
    for (int c = 0; c < shape.chunks; c++)
      add(sum[0], shift[0], values + c * L * unit, x + a.col[p] * shape.x_column + c * L);
  }
  const int rows = L / shape.segment;
  for (int i = 0; i < NA; i++)
    for (int m = 0; m < MT; m++) {
      Sum all = sum[0][i][m] - shift[0][i];
      for (int u = 1; u < U; u++) all += sum[u][i][m] - shift[u][i];
      float* to = out + m * kOutRows + i * rows;
      if (shape.segment == 1) {
        store<L>(to, (VecL<L>)all);
        continue;
      }
      decltype(all[0] + 0) lanes[L];
      memcpy(lanes, &all, sizeof lanes);
      for (int half = shape.segment / 2; half; half /= 2)
        for (int r = 0; r < L; r += shape.segment)
          for (int h = 0; h < half; h++) lanes[r + h] += lanes[r + h + half];
      for (int r = 0; r < rows; r++) memcpy(to + r, lanes + r * shape.segment, 4);
    }
}

// y of MT tokens from `rows` sums each.
template <class D, int A>
void decode_finish(
    const BsrLinear& a, const float* sums, const float* scales, int64_t token, int tokens, int64_t row, int64_t rows) {
  for (int64_t j = 0; j < rows; j += kLanes) {
    const int64_t wide = smaller(kLanes, rows - j);
    const Vec bias = a.bias ? load_first((const typename D::Element*)a.bias + row + j, wide) : Vec{};
    const Vec scale = D::kQuantized ? load_first(a.scales + row + j, wide) : Vec{};
    for (int m = 0; m < tokens; m++)
      finish<D, A>(a, load(sums + m * kOutRows + j), scale * scales[token + m], bias, token + m, row + j, wide);
  }
}

template <class D, int L, bool Splat, int NA, int MT>
void decode_tokens(
    const BsrLinear& a, const DecodeShape& shape, const float* prepared, const float* scales, int64_t token,
    int64_t begin, int64_t end) {
  float out[MT * kOutRows + kLanes];
  const int per_step = NA * (L / shape.segment);
  const float* x = prepared + token * shape.x_token;
  int64_t row = begin * a.n, filled = 0;
  auto flush = [&] {
    switch (a.activation) {
      case kRelu: decode_finish<D, kRelu>(a, out, scales, token, MT, row, filled); break;
      case kGelu: decode_finish<D, kGelu>(a, out, scales, token, MT, row, filled); break;
      case kGeluTanh: decode_finish<D, kGeluTanh>(a, out, scales, token, MT, row, filled); break;
      default: decode_finish<D, kNone>(a, out, scales, token, MT, row, filled);
    }
    row += filled;
    filled = 0;
  };
  for (int64_t block_row = begin; block_row < end; block_row++)
    for (int sum0 = 0; sum0 < shape.vectors; sum0 += NA) {
      if (filled + per_step > kOutRows) flush();
      decode_rows<D, L, Splat, NA, MT>(a, shape, x, block_row, sum0, out + filled);
      filled += per_step;
    }
  flush();
}

template <class D, int L, bool Splat, int NA>
void few_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  const int64_t total = cost_before(a, a.N), step = a.n * ((15 + a.n) / a.n);
  const int64_t begin = row_at_cost(a, total * part / parts, step) / a.n;
  const int64_t end = row_at_cost(a, total * (part + 1) / parts, step) / a.n;
  if (begin >= end) return;
  const DecodeShape shape = decode_shape<D, L>(a);
  float scales[8];
  prepare_tokens<D, L>(a, shape, scratch, scales);
  int64_t m = 0;
  for (; m + 8 <= a.M; m += 8) decode_tokens<D, L, Splat, (NA > 1 ? 2 : 1), 8>(a, shape, scratch, scales, m, begin, end);
  for (; m + 4 <= a.M; m += 4) decode_tokens<D, L, Splat, NA, 4>(a, shape, scratch, scales, m, begin, end);
  for (; m + 2 <= a.M; m += 2) decode_tokens<D, L, Splat, NA, 2>(a, shape, scratch, scales, m, begin, end);
  for (; m < a.M; m++) decode_tokens<D, L, Splat, NA, 1>(a, shape, scratch, scales, m, begin, end);
}

template <class D, int L>
void few_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  const DecodeShape shape = decode_shape<D, L>(a);
  if (shape.words == 1) return few_tokens<D, L, true, 1>(a, part, parts, scratch);
  if (shape.vectors % 4 == 0) return few_tokens<D, L, false, 4>(a, part, parts, scratch);
  if (shape.vectors % 2 == 0) return few_tokens<D, L, false, 2>(a, part, parts, scratch);
  few_tokens<D, L, false, 1>(a, part, parts, scratch);
}

// Vectors as long as the blocks allow: words of a row and lanes divide one another, or scalars.
template <class D>
void few_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  const int words = a.k / D::kUnit;
  auto fits = [&](int lanes) {
    return lanes <= kLanes && a.n * words % lanes == 0 && (words % lanes == 0 || lanes % words == 0);
  };
  if (fits(16)) return few_tokens<D, kLanes >= 16 ? 16 : 4>(a, part, parts, scratch);
  if (fits(8)) return few_tokens<D, kLanes >= 8 ? 8 : 4>(a, part, parts, scratch);
  if (fits(4)) return few_tokens<D, 4>(a, part, parts, scratch);
  few_tokens<D, 1>(a, part, parts, scratch);
}

}  // namespace

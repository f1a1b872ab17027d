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
constexpr int kMostTokens = 8;

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

// x as words, shape.x_token of them per token, and for int8 the scale of each token. Zeros follow the last
// token where the kernels take more tokens than there are.
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
    float* plain = expand ? prepared + kMostTokens * shape.x_token : out;
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
  const int64_t taken = a.M > 4 ? kMostTokens : a.M == 3 ? 4 : a.M;
  memset(prepared + a.M * shape.x_token, 0, (taken - a.M) * shape.x_token * sizeof(float));
}

constexpr int kOutRows = 128;

// One block row's sums [sum0, sum0 + NA), for MT tokens: out[m][row] in words, stride kOutRows.

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
      float lanes[L];
      store<L>(lanes, (VecL<L>)add_segments<L>(all, shape.segment));
      for (int r = 0; r < rows; r++) to[r] = lanes[r * shape.segment];
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

template <class D>
SNLP_INLINE void decode_finish(
    const BsrLinear& a, const float* sums, const float* scales, int64_t token, int tokens, int64_t row, int64_t rows) {
  switch (a.activation) {
    case kRelu: return decode_finish<D, kRelu>(a, sums, scales, token, tokens, row, rows);
    case kGelu: return decode_finish<D, kGelu>(a, sums, scales, token, tokens, row, rows);
    case kGeluTanh: return decode_finish<D, kGeluTanh>(a, sums, scales, token, tokens, row, rows);
    default: return decode_finish<D, kNone>(a, sums, scales, token, tokens, row, rows);
  }
}

// MT tokens, of which the first `tokens` are written: three are as fast as four.
template <class D, int L, bool Splat, int NA, int MT>
void decode_tokens(
    const BsrLinear& a, const DecodeShape& shape, const float* prepared, const float* scales, int64_t token, int tokens,
    int64_t begin, int64_t end) {
  float out[MT * kOutRows + kLanes];
  const int per_step = NA * (L / shape.segment);
  const float* x = prepared + token * shape.x_token;
  int64_t row = begin * a.n, filled = 0;
  auto flush = [&] {
    decode_finish<D>(a, out, scales, token, tokens, row, filled);
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

// All tokens and the block rows [begin, end).
template <class D, int L, bool Splat, int NA>
void decode_matrix(
    const BsrLinear& a, const DecodeShape& shape, const float* prepared, const float* scales, int64_t begin,
    int64_t end) {
  for (int64_t m = 0; m < a.M;) {
    const int left = (int)(a.M - m), most = NA > 1 ? 4 : 8, now = left < most ? left : most;
    if (now > 4) {
      decode_tokens<D, L, Splat, 1, 8>(a, shape, prepared, scales, m, now, begin, end);
    } else if (now > 2) {
      decode_tokens<D, L, Splat, NA, 4>(a, shape, prepared, scales, m, now, begin, end);
    } else if (now > 1) {
      decode_tokens<D, L, Splat, NA, 2>(a, shape, prepared, scales, m, now, begin, end);
    } else {
      decode_tokens<D, L, Splat, NA, 1>(a, shape, prepared, scales, m, now, begin, end);
    }
    m += now;
  }
}

template <class D, int L, bool Splat, int NA>
void few_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  const int64_t total = cost_before(a, a.N), step = a.n * ((15 + a.n) / a.n);
  const int64_t begin = row_at_cost(a, total * part / parts, step) / a.n;
  const int64_t end = row_at_cost(a, total * (part + 1) / parts, step) / a.n;
  if (begin >= end) return;
  const DecodeShape shape = decode_shape<D, L>(a);
  float scales[kMostTokens] = {};
  prepare_tokens<D, L>(a, shape, scratch, scales);
  decode_matrix<D, L, Splat, NA>(a, shape, scratch, scales, begin, end);
  for (const BsrLinear* own = a.next; own; own = own->next)
    decode_matrix<D, L, Splat, NA>(*own, shape, scratch, scales, 0, own->N / own->n);
}

template <class D, int L>
void few_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  const DecodeShape shape = decode_shape<D, L>(a);
  if (shape.words == 1) return few_tokens<D, L, true, 1>(a, part, parts, scratch);
  if (shape.vectors % 4 == 0) return few_tokens<D, L, false, 4>(a, part, parts, scratch);
  if (shape.vectors % 2 == 0) return few_tokens<D, L, false, 2>(a, part, parts, scratch);
  few_tokens<D, L, false, 1>(a, part, parts, scratch);
}

// The rows [begin, end), eight sums at a time.
template <class S>
void one_token_matrix(const BsrLinear& a, const typename S::Word* x, float scale, int64_t begin, int64_t end) {
  typedef typename S::Word Word;
  constexpr int U = 8;
  Word out[kOutRows + kLanes];
  for (int64_t row0 = begin; row0 < end; row0 += kOutRows) {
    const int64_t rows = smaller(kOutRows, end - row0);
    for (int64_t j = 0; j < rows; j++) {
      const int64_t block_row = (row0 + j) / a.n, inside = (row0 + j) % a.n, block = (int64_t)a.n * a.k;
      const int64_t first = a.crow[block_row], last = a.crow[block_row + 1];
      const typename S::Weight* w = (const typename S::Weight*)a.values + first * block + inside * a.k;
      Word sum[U] = {};
      int64_t p = first;
      if (a.k == 1)
        for (; p + U <= last; p += U, w += U * block)
          SNLP_UNROLL for (int u = 0; u < U; u++) sum[u] += x[a.col[p + u]] * S::word(w[u * block]);
      for (; p < last; p++, w += block)
        for (int b = 0; b < a.k; b++) sum[b % U] += x[(int64_t)a.col[p] * a.k + b] * S::word(w[b]);
      out[j] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
    decode_finish<S>(a, (const float*)out, &scale, 0, 1, row0, rows);
  }
}

// One token and blocks that fit no vector (unstructured weights above all): scalars.
template <class S>
void one_token(const BsrLinear& a, int part, int parts, float* scratch) {
  typedef typename S::Word Word;
  const int64_t total = cost_before(a, a.N), step = a.n * ((15 + a.n) / a.n);
  const int64_t begin = row_at_cost(a, total * part / parts, step), end = row_at_cost(a, total * (part + 1) / parts, step);
  if (begin >= end) return;
  const DecodeShape plain = {1, 1, 0, 1, 0, 1, a.K};
  float scale = 1;
  prepare_tokens<S, 1>(a, plain, scratch, &scale);
  one_token_matrix<S>(a, (const Word*)scratch, scale, begin, end);
  for (const BsrLinear* own = a.next; own; own = own->next)
    one_token_matrix<S>(*own, (const Word*)scratch, scale, 0, own->N);
}

// The longest vectors that the blocks allow: words of a row and lanes divide one another. 1 if there are none.
template <class D>
int decode_lanes(const BsrLinear& a) {
  const int words = a.k / D::kUnit;
  for (int lanes = kLanes; lanes >= 4; lanes /= 2)
    if (a.n * words % lanes == 0 && (words % lanes == 0 || lanes % words == 0)) return lanes;
  return 1;
}

// Up to how many tokens this is faster than a tile (measured at 50 % and 90 % zeros).
template <class D>
int64_t most_decode_tokens(const BsrLinear& a, int lanes) {
  if (lanes == 1) return 1;
  if (lanes < 16) return 4;
  const int64_t words = (int64_t)(a.crow[a.N / a.n] - a.crow[0]) * a.n * a.k / D::kUnit;
  return a.k == D::kUnit || words >= 128 * a.N ? kMostTokens : 5;
}

// False if a tile is faster.
template <class D>
bool few_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  const int lanes = decode_lanes<D>(a);
  if (a.M > most_decode_tokens<D>(a, lanes)) return false;
  if (lanes == 16)
    few_tokens<D, kLanes >= 16 ? 16 : 4>(a, part, parts, scratch);
  else if (lanes == 8)
    few_tokens<D, kLanes >= 8 ? 8 : 4>(a, part, parts, scratch);
  else if (lanes == 4)
    few_tokens<D, 4>(a, part, parts, scratch);
  else
    one_token<typename D::Scalar>(a, part, parts, scratch);
  return true;
}

}  // namespace

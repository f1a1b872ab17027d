// Few tokens (decode): lanes run over the kept values of a row as they lie in memory, so that weights and
// codes stream once, in order, and set the pace.
#pragma once

#include "pick.h"

namespace {

constexpr int kPrefetchDecode = 4096;  // bytes ahead in the weight stream

// sum[m] = the products of a row with token m, lane by lane, for MT tokens that are x_token words apart.
// One row at a time: several at once would cut the stream into more than the hardware prefetches.
template <class D, class P, int MT>
SNLP_INLINE void row_sums(const NmLinear& a, int64_t row, const float* x, int64_t x_token, Vec sum[MT]) {
  constexpr int V = kLanes * D::kUnit, step = kLanes * P::kRatio;  // V values choose from `step` words of x
  const int64_t count = a.row_values();
  const typename D::Weight* values = (const typename D::Weight*)a.values + row * count;
  const uint8_t* codes = a.packed + row * a.packed_bytes();
  for (int m = 0; m < MT; m++) sum[m] = Vec{};
  auto add = [&](int64_t v, int64_t left) {
    __builtin_prefetch((const char*)(values + v) + kPrefetchDecode);
    const Vec weight = first_weights<D>(values + v, left);
    const auto at = positions<D, P>(codes + v * P::kBits / 8);
    SNLP_UNROLL for (int m = 0; m < MT; m++)
      sum[m] = D::template dot<kLanes>(sum[m], pick<D, P>(x + m * x_token, at), weight);
  };
  int64_t v = 0;
  for (; v + V <= count; v += V, x += step) add(v, V);
  if (v < count) add(v, count - v);
}

// The rows [begin, end), kLanes at a time, for MT tokens from `token` on.
template <class D, class P, int A, int MT>
void few_tokens(const NmLinear& a, const float* prepared, int64_t x_token, int64_t token, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t wide = smaller(kLanes, a.N - row);
    Vec sums[MT][kLanes] = {};
    for (int j = 0; j < wide; j++) {
      Vec sum[MT];
      row_sums<D, P, MT>(a, row + j, prepared + token * x_token, x_token, sum);
      for (int m = 0; m < MT; m++) sums[m][j] = sum[m];
    }
    const Vec bias = a.bias ? load_first((const typename D::Element*)a.bias + row, wide) : Vec{};
    for (int m = 0; m < MT; m++) {
      transpose(sums[m]);
      for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[m][i] += sums[m][i + half];
      finish<D, A>(a, sums[m][0], Vec{}, bias, token + m, row, wide);
    }
  }
}

template <class D, class P, int A>
void few_tokens(const NmLinear& a, const float* prepared, int64_t x_token, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + 8 <= a.M; m += 8) few_tokens<D, P, A, 8>(a, prepared, x_token, m, begin, end);
  for (; m + 4 <= a.M; m += 4) few_tokens<D, P, A, 4>(a, prepared, x_token, m, begin, end);
  for (; m + 2 <= a.M; m += 2) few_tokens<D, P, A, 2>(a, prepared, x_token, m, begin, end);
  for (; m < a.M; m++) few_tokens<D, P, A, 1>(a, prepared, x_token, m, begin, end);
}

// This part's share of the rows.
template <class D, class P>
void few_tokens(const NmLinear& a, int part, int parts, float* scratch) {
  const int64_t groups = (a.N + kLanes - 1) / kLanes;
  const int64_t begin = groups * part / parts * kLanes, end = groups * (part + 1) / parts * kLanes;
  if (begin >= end) return;
  constexpr int step = kLanes * P::kRatio, V = kLanes * D::kUnit;
  const int64_t x_token = (a.row_values() + V - 1) / V * step;
  for (int64_t m = 0; m < a.M; m++)
    for (int64_t w = 0; w < x_token; w += kLanes) {
      const typename D::Element* x = (const typename D::Element*)a.x + m * a.K;
      store(scratch + m * x_token + w, w * D::kUnit < a.K ? token_words<D>(x, w, a.K, 1) : Vec{});
    }
  switch (a.activation) {
    case kRelu: return few_tokens<D, P, kRelu>(a, scratch, x_token, begin, end);
    case kGelu: return few_tokens<D, P, kGelu>(a, scratch, x_token, begin, end);
    case kGeluTanh: return few_tokens<D, P, kGeluTanh>(a, scratch, x_token, begin, end);
    default: return few_tokens<D, P, kNone>(a, scratch, x_token, begin, end);
  }
}

}  // namespace

// Projections of a tile whose features lie in words: the micro-kernels of bsr_linear, 16 outputs at a time, whose
// sums stay feature-major.
#pragma once

#include "../bsr_linear/many_tokens.h"
#include "../bsr_linear/pairs.h"
#include "rows.h"

namespace {

// A tile as a projection reads it.
struct Words {
  const float* words;
  const float* scales;  // int8: of each token
};

// Whether bfloat16 weights meet singles (see rows.h) instead of words.
template <class D>
SNLP_INLINE bool takes_singles(const Projection& p) {
#if defined(__AVX512BF16__)
  return !D::kQuantized && D::kUnit == 2 && p.k == 1;
#else
  return false;
#endif
}

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// Whether bfloat16 weights can meet bfloat16 inputs: blocks have an even number of inputs, or one.
inline bool takes_pairs(const Projection& p) { return p.k % 2 == 0 || takes_singles<Bf16Dot>(p); }
#endif

// Where words_for puts what a projection reads: words [widest][T], and T scales with their inverses.
struct WordsScratch {
  float *words, *scales, *inverse;
};

// The rows of a tile as `p` reads them.
template <class D>
Words words_for(const Projection& p, const float* rows, int T, const WordsScratch& w) {
  if constexpr (D::kUnit == 1 && !D::kQuantized) return {rows, nullptr};
#if defined(__AVX512BF16__)
  if (takes_singles<D>(p)) {
    rows_to_singles(rows, p.K, T, w.words);
    return {w.words, nullptr};
  }
#endif
  if constexpr (D::kQuantized) token_scales(rows, p.K, T, w.scales, w.inverse);
  if constexpr (D::kUnit > 1 || D::kQuantized) rows_to_words<D>(rows, p.K, T, w.inverse, w.words);
  return {w.words, w.scales};
}

template <class D>
void sum_share(const Projection& p, int part, int parts) {
  if constexpr (D::kShift != 0) {
    const int64_t block_rows = p.N / p.n;
    sum_rows<D>(p, block_rows * part / parts * p.n, block_rows * (part + 1) / parts * p.n, p.row_sums);
  }
}

template <class D>
using GroupFn = void(const Projection&, const float*, int64_t, const int32_t*, int64_t, int64_t, float*);

template <class D, class B, int R>
void group_of(
    const Projection& p, const float* words, int64_t ld, const int32_t* row_sums, int64_t row0, int64_t rows, float* out) {
  B::template group<D, R>(p, words, ld, row_sums, row0, rows, out);
}

template <class D, int BN, int R>
GroupFn<D>* choose_group(const Projection& p) {
#if defined(__AVX512BF16__)
  if constexpr (!D::kQuantized && D::kUnit == 2)
    if (p.k == 1) return group_of<D, PairedColumns<BN>, R>;
#endif
  return p.k == D::kUnit ? group_of<D, Blocks<BN, 0, true>, R> : group_of<D, Blocks<BN, 0, false>, R>;
}

template <class D, int R>
GroupFn<D>* choose_group(const Projection& p) {
  if (p.n % 8 == 0) return choose_group<D, kRegisters == 32 ? 8 : 4, R>(p);
  if (p.n % 4 == 0) return choose_group<D, 4, R>(p);
  return p.n % 2 == 0 ? choose_group<D, 2, R>(p) : choose_group<D, 1, R>(p);
}

// sink(row0, rows, t0, at) for every 16 rows and the W tokens from t0 on: at(j, t) is the output of row row0 + j for the
// kLanes tokens from t0 + t on.
template <class D, int R, class Sink>
SNLP_INLINE void project(const Projection& p, const Words& x, int T, Sink sink) {
  constexpr int W = R * kLanes;
  alignas(64) float out[kGroup * W];
  const bool singles = takes_singles<D>(p);
  GroupFn<D>* group = choose_group<D, R>(p);
  for (int64_t row0 = 0; row0 < p.N; row0 += kGroup) {
    const int64_t rows = smaller(kGroup, p.N - row0);
    for (int t0 = 0; t0 < T; t0 += W) {
      group(p, x.words + t0, singles ? 16 : T, p.row_sums, row0, rows, out);
      sink(row0, rows, t0, [&](int64_t j, int t) __attribute__((always_inline)) {
        Vec v = D::template value<kLanes>((typename D::template Sum<kLanes>)load(out + j * W + t));
        if constexpr (D::kQuantized) v *= load(x.scales + t0 + t) * p.scales[row0 + j];
        return v + p.bias[row0 + j];
      });
    }
  }
}

// The outputs as rows to[N][T] of E; change(v, row, t) has the last word.
template <class D, int R, class E, class Change>
SNLP_INLINE void project_to_rows(const Projection& p, const Words& x, int T, E* to, Change change) {
  project<D, R>(p, x, T, [&](int64_t row0, int64_t rows, int t0, auto at) __attribute__((always_inline)) {
    for (int64_t j = 0; j < rows; j++)
      SNLP_UNROLL for (int t = 0; t < R * kLanes; t += kLanes)
        store(to + (row0 + j) * T + t0 + t, change(at(j, t), row0 + j, t0 + t));
  });
}

// The outputs as words of two bfloat16 rows each, to[N / 2][T].
template <class D, int R, class Change>
SNLP_INLINE void project_to_pairs(const Projection& p, const Words& x, int T, float* to, Change change) {
  project<D, R>(p, x, T, [&](int64_t row0, int64_t rows, int t0, auto at) __attribute__((always_inline)) {
    for (int64_t j = 0; j < rows; j += 2)
      SNLP_UNROLL for (int t = 0; t < R * kLanes; t += kLanes)
        store(to + (row0 + j) / 2 * T + t0 + t, pair_words(change(at(j, t)), j + 1 < rows ? change(at(j + 1, t)) : Vec{}));
  });
}

#if defined(__AVX512BF16__)
// The outputs as singles, to[N][16].
template <class D, int R, class Change>
SNLP_INLINE void project_to_singles(const Projection& p, const Words& x, int T, float* to, Change change) {
  project<D, R>(p, x, T, [&](int64_t row0, int64_t rows, int, auto at) __attribute__((always_inline)) {
    for (int64_t j = 0; j < rows; j++)
      store_single(to + (row0 + j) * 16, change(at(j, 0)), R > 1 ? change(at(j, 16)) : Vec{});
  });
}
#endif

}  // namespace

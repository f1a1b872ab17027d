// Gradients. Both run in float whatever the dtype, widening bfloat16 as it is read.
//
// dx: lanes run over tokens, and the tile of dx [K][T] stays in cache. A block row keeps its n rows of grad
// in registers and adds their products with each block to the block's k rows of the tile, so the pattern
// serves as it is, untransposed.
//
// dvalues: lanes run over the inputs of a block where there are enough, else over its outputs.
#pragma once

#include "many_tokens.h"

namespace {

// ---- dx ----

// dx[k of the block][T] += sum over BN rows j of grad[j][T] * values[j][k].
template <class E, int BN, int R>
SNLP_INLINE void dgrad_rows(
    const float* grad, const int32_t* col, int64_t count, const E* values, int64_t n, int64_t k, float* dx) {
  constexpr int T = R * kLanes;
  Vec g[BN][R];
  for (int j = 0; j < BN; j++)
    for (int r = 0; r < R; r++) g[j][r] = load(grad + j * T + r * kLanes);
  for (int64_t p = 0; p < count; p++, values += n * k) {
    float* to = dx + (int64_t)col[p] * k * T;
    __builtin_prefetch((const char*)values + kPrefetchTile);
    for (int64_t b = 0; b < k; b++, to += T) {
      Vec sum[R];
      SNLP_UNROLL for (int r = 0; r < R; r++) sum[r] = load(to + r * kLanes);
      SNLP_UNROLL for (int j = 0; j < BN; j++) {
        const Vec weight = splat(values[j * k + b]);
        SNLP_UNROLL for (int r = 0; r < R; r++) sum[r] += g[j][r] * weight;
      }
      SNLP_UNROLL for (int r = 0; r < R; r++) store(to + r * kLanes, sum[r]);
    }
  }
}

template <class E, int R>
void dgrad_tile(const BsrLinearGrad& a, int64_t token0, int64_t tokens, float* dx, float* strip) {
  constexpr int T = R * kLanes;
  memset(dx, 0, a.K * T * sizeof(float));
  const E* values = (const E*)a.values;
  const int64_t step = a.n >= 64 ? a.n : 64 / a.n * a.n;  // rows of grad that are transposed together
  for (int64_t row0 = 0; row0 < a.N; row0 += step) {
    const int64_t rows = smaller(step, a.N - row0);
    pack_tile<Wide<E>, R>((const E*)a.grad + token0 * a.N + row0, a.N, rows, tokens, nullptr, strip);
    for (int64_t row = row0; row < row0 + rows; row += a.n) {
      const int64_t first = a.crow[row / a.n], count = a.crow[row / a.n + 1] - first;
      const int32_t* col = a.col + first;
      const E* block = values + first * a.n * a.k;
      const float* grad = strip + (row - row0) * T;
      int j = 0;
      for (; j + 8 <= a.n && kRegisters == 32; j += 8)
        dgrad_rows<E, 8, R>(grad + j * T, col, count, block + j * a.k, a.n, a.k, dx);
      for (; j + 4 <= a.n; j += 4) dgrad_rows<E, 4, R>(grad + j * T, col, count, block + j * a.k, a.n, a.k, dx);
      for (; j < a.n; j++) dgrad_rows<E, 1, R>(grad + j * T, col, count, block + j * a.k, a.n, a.k, dx);
    }
  }
  for (int64_t k = 0; k < a.K; k += kLanes) {
    const int64_t wide = smaller(kLanes, a.K - k);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = i < wide ? load(dx + (k + i) * T + t) : Vec{};
      transpose(r);
      for (int i = 0; i < smaller(kLanes, tokens - t); i++)
        store_first((E*)a.dx + (token0 + t + i) * a.K + k, r[i], wide);
    }
  }
}

// This part's share of the tiles; narrow tiles where there are few tokens.
template <class E>
void dgrad(const BsrLinearGrad& a, int part, int parts, float* scratch) {
  constexpr int R = 2;
  const int64_t T = (a.M <= kLanes * (int64_t)parts ? 1 : R) * kLanes, tiles = (a.M + T - 1) / T;
  float* strip = scratch + (a.K * R * kLanes + 15) / 16 * 16;
  for (int64_t i = tiles * part / parts; i < tiles * (part + 1) / parts; i++) {
    const int64_t tokens = smaller(T, a.M - i * T);
    if (tokens <= kLanes)
      dgrad_tile<E, 1>(a, i * T, tokens, scratch, strip);
    else
      dgrad_tile<E, R>(a, i * T, tokens, scratch, strip);
  }
}

// ---- dvalues ----

// Outputs [j0, j0 + L) and one input of P blocks: lanes run over outputs, grad is read as it lies and x
// comes feature-major.
template <class E, int L, int P>
SNLP_INLINE void wgrad_outputs(
    const BsrLinearGrad& a, const E* grad, const float* tile, int64_t T, int64_t tokens, int64_t p, int64_t j0) {
  for (int64_t b = 0; b < a.k; b++) {
    const float* x[P];
    VecL<L> sum[P] = {};
    for (int i = 0; i < P; i++) x[i] = tile + (a.col[p + i] * a.k + b) * T;
    for (int64_t t = 0; t < tokens; t++) {
      const VecL<L> g = load<L>(grad + t * a.N);
      SNLP_UNROLL for (int i = 0; i < P; i++) sum[i] += g * x[i][t];
    }
    for (int i = 0; i < P; i++) {
      float* out = a.dvalues + ((p + i) * a.n + j0) * a.k + b;
      if (a.k == 1)
        store<L>(out, load<L>(out) + sum[i]);
      else
        for (int l = 0; l < L; l++) out[l * a.k] += sum[i][l];
    }
  }
}

// Inputs [b0, b0 + L) of J outputs of one block: lanes run over inputs, both operands as they lie.
template <class E, int L, int J>
SNLP_INLINE void wgrad_inputs(
    const BsrLinearGrad& a, const E* grad, const E* x, int64_t tokens, int64_t p, int64_t j0, int64_t b0) {
  VecL<L> sum[J] = {};
  for (int64_t t = 0; t < tokens; t++) {
    const VecL<L> xv = load<L>(x + t * a.K);
    SNLP_UNROLL for (int j = 0; j < J; j++) sum[j] += xv * splat<L>(grad[t * a.N + j]);
  }
  for (int j = 0; j < J; j++) {
    float* out = a.dvalues + (p * a.n + j0 + j) * a.k + b0;
    store<L>(out, load<L>(out) + sum[j]);
  }
}

// This part owns the block rows [begin, end), cut by stored blocks.
SNLP_INLINE int64_t row_at_block(const BsrLinearGrad& a, int64_t block) {
  int64_t low = 0, high = a.N / a.n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.crow[middle] < block)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class E, int L>
void wgrad_by_outputs(const BsrLinearGrad& a, int64_t begin, int64_t end, float* tile) {
  constexpr int R = 2, T = R * kLanes, P = 8;
  for (int64_t token0 = 0; token0 < a.M; token0 += T) {
    const int64_t tokens = smaller(T, a.M - token0);
    pack_tile<Wide<E>, R>((const E*)a.x + token0 * a.K, a.K, a.K, tokens, nullptr, tile);
    for (int64_t row = begin; row < end; row++)
      for (int64_t j = 0; j < a.n; j += L) {
        const E* grad = (const E*)a.grad + token0 * a.N + row * a.n + j;
        const int64_t last = a.crow[row + 1];
        int64_t p = a.crow[row];
        for (; p + P <= last; p += P) wgrad_outputs<E, L, P>(a, grad, tile, T, tokens, p, j);
        for (; p < last; p++) wgrad_outputs<E, L, 1>(a, grad, tile, T, tokens, p, j);
      }
  }
}

template <class E, int L>
void wgrad_by_inputs(const BsrLinearGrad& a, int64_t begin, int64_t end) {
  constexpr int T = 32;
  for (int64_t token0 = 0; token0 < a.M; token0 += T) {
    const int64_t tokens = smaller(T, a.M - token0);
    for (int64_t row = begin; row < end; row++)
      for (int64_t p = a.crow[row]; p < a.crow[row + 1]; p++)
        for (int64_t b = 0; b < a.k; b += L) {
          const E* x = (const E*)a.x + token0 * a.K + (int64_t)a.col[p] * a.k + b;
          const E* grad = (const E*)a.grad + token0 * a.N + row * a.n;
          int64_t j = 0;
          for (; j + 8 <= a.n; j += 8) wgrad_inputs<E, L, 8>(a, grad + j, x, tokens, p, j, b);
          for (; j + 4 <= a.n; j += 4) wgrad_inputs<E, L, 4>(a, grad + j, x, tokens, p, j, b);
          for (; j < a.n; j++) wgrad_inputs<E, L, 1>(a, grad + j, x, tokens, p, j, b);
        }
  }
}

template <class E>
void wgrad(const BsrLinearGrad& a, int part, int parts, float* scratch) {
  const int64_t blocks = a.crow[a.N / a.n];
  const int64_t begin = row_at_block(a, blocks * part / parts);
  const int64_t end = part + 1 == parts ? a.N / a.n : row_at_block(a, blocks * (part + 1) / parts);
  if (begin >= end || blocks == 0) return;
  const int64_t first = a.crow[begin] * (int64_t)a.n * a.k, last = a.crow[end] * (int64_t)a.n * a.k;
  memset(a.dvalues + first, 0, (last - first) * sizeof(float));
  if (kLanes >= 16 && a.k % 16 == 0) return wgrad_by_inputs<E, kLanes >= 16 ? 16 : 4>(a, begin, end);
  if (kLanes >= 8 && a.k % 8 == 0) return wgrad_by_inputs<E, kLanes >= 8 ? 8 : 4>(a, begin, end);
  if (kLanes >= 16 && a.n % 16 == 0) return wgrad_by_outputs<E, kLanes >= 16 ? 16 : 4>(a, begin, end, scratch);
  if (kLanes >= 8 && a.n % 8 == 0) return wgrad_by_outputs<E, kLanes >= 8 ? 8 : 4>(a, begin, end, scratch);
  if (a.k % 4 == 0) return wgrad_by_inputs<E, 4>(a, begin, end);
  if (a.n % 4 == 0) return wgrad_by_outputs<E, 4>(a, begin, end, scratch);
  wgrad_by_outputs<E, 1>(a, begin, end, scratch);
}

}  // namespace

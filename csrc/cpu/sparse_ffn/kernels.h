// Tiles of tokens, each from x to y on its own: its features stay feature-major, and in the second-level cache.
#pragma once

#include "../encoder_layer/feed_forward.h"
#include "sparse_ffn.h"

namespace {

constexpr int kNarrow = 16, kWideTile = 32;  // tokens of a tile

template <class D, int R>
void one_tile(const SparseFfn& a, int64_t token0, int T, float* scratch) {
  float *rows = scratch, *hidden = rows + a.widest() * T, *words = hidden + a.fc1.N * T;
  float* scales = words + (a.widest() + 16) * T;
  const WordsScratch w{words, scales, scales + T};
  int32_t source[kWideTile];
  for (int t = 0; t < T; t++) source[t] = t < a.M - token0 ? t : -1;
  if (a.half)
    pack_rows<Bf16Wide>((const bf16*)a.x + token0 * a.fc1.K, a.fc1.K, source, a.fc1.K, T, rows);
  else
    pack_rows<F32>((const float*)a.x + token0 * a.fc1.K, a.fc1.K, source, a.fc1.K, T, rows);
  const Words x = words_for<D>(a.fc1, rows, T, w);
  const Words inner = project_and_activate<D, R>(a.fc1, x, T, a.activation, a.fc2, hidden, w);
  project_to_rows<D, R>(a.fc2, inner, T, rows, [](Vec v, int64_t, int) { return v; });
  if (a.half)
    unpack_rows(rows, source, a.fc2.N, T, (bf16*)a.y + token0 * a.fc2.N, a.fc2.N);
  else
    unpack_rows(rows, source, a.fc2.N, T, (float*)a.y + token0 * a.fc2.N, a.fc2.N);
}

// D multiplies weights. A ragged last tile runs narrow if it can.
template <class D>
void forward(const SparseFfn& a, int phase, int part, int parts, float* scratch) {
  if (phase == kFfnSums) {
    sum_share<D>(a.fc1, part, parts);
    sum_share<D>(a.fc2, part, parts);
    return;
  }
  constexpr int R = 2;
  const int64_t tiles = (a.M + a.T - 1) / a.T;
  for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; tile++) {
    const int64_t token0 = tile * a.T;
    const int T = a.M - token0 <= kNarrow ? kNarrow : a.T;
    T < R * kLanes ? one_tile<D, 1>(a, token0, T, scratch) : one_tile<D, R>(a, token0, T, scratch);
  }
}

// bfloat16 weights: widened, unless x is bfloat16 as well and blocks have an even number of inputs, or one.
[[maybe_unused]] void forward_bfloat(const SparseFfn& a, int phase, int part, int parts, float* scratch) {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  if (a.half && takes_pairs(a.fc1) && takes_pairs(a.fc2)) return forward<Bf16Dot>(a, phase, part, parts, scratch);
#endif
  forward<Bf16Wide>(a, phase, part, parts, scratch);
}

}  // namespace

#define SNLP_FORWARD(name, ...)                                                                    \
  void sparse_ffn_##name(const SparseFfn& a, int phase, int part, int parts, float* scratch) {     \
    __VA_ARGS__(a, phase, part, parts, scratch);                                                   \
  }

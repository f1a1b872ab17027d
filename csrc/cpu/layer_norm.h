// LayerNorm of a row that is the sum of others. The sum is made in scratch, in float, and stays in cache for
// the statistics and the result.
#pragma once

#include "vec.h"

namespace {

constexpr int kSums = 4;  // independent sums, to cover the latency of an addition

SNLP_INLINE float total(const Vec (&sums)[kSums]) {
  return add_segments<kLanes>((sums[0] + sums[1]) + (sums[2] + sums[3]), kLanes)[0];
}

// Calls f(which of kSums, first element, elements) for the vectors of a row; the last may be partial.
template <class F>
SNLP_INLINE void each_vector(int64_t H, F f) {
  int64_t h = 0;
  for (; h + kSums * kLanes <= H; h += kSums * kLanes)
    SNLP_UNROLL for (int i = 0; i < kSums; i++) f(i, h + i * kLanes, kLanes);
  for (; h + kLanes <= H; h += kLanes) f(0, h, kLanes);
  if (h < H) f(0, h, H - h);
}

// row[h] = from[0][h] + ... + from[N - 1][h]; returns the sum over h. `row` has room for whole vectors.
template <int N, class E>
SNLP_INLINE float add_rows(const E* const* from, int64_t H, float* row) {
  Vec sums[kSums] = {};
  each_vector(H, [&](int i, int64_t h, int64_t count) __attribute__((always_inline)) {
    Vec v = load_first(from[0] + h, count);
    for (int n = 1; n < N; n++) v += load_first(from[n] + h, count);
    store(row + h, v);
    sums[i] += v;
  });
  return total(sums);
}

// y = (row - mean) / sqrt(variance + eps) * weight + bias, for a row with this sum; bias may be null.
//
// The rounded mean may be off by many last bits of a small deviation: what deviations from it add up to
// corrects mean and variance.
template <class E>
SNLP_INLINE void normalize(float* row, float sum, int64_t H, const E* weight, const E* bias, float eps, E* y) {
  const float mean = sum / H;
  for (int64_t h = H; h % kLanes; h++) row[h] = mean;  // so that the lanes beyond H do not deviate
  Vec deviations[kSums] = {}, squares[kSums] = {};
  each_vector(H, [&](int i, int64_t h, int64_t) __attribute__((always_inline)) {
    const Vec deviation = load(row + h) - mean;
    deviations[i] += deviation;
    squares[i] += deviation * deviation;
  });
  const float shift = total(deviations) / H, variance = total(squares) / H - shift * shift;
  const float scale = 1 / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
  each_vector(H, [&](int, int64_t h, int64_t count) __attribute__((always_inline)) {
    const Vec normal = (load(row + h) - mean - shift) * scale;
    const Vec offset = bias ? load_first(bias + h, count) : Vec{};
    store_first(y + h, normal * load_first(weight + h, count) + offset, count);
  });
}

}  // namespace

// Elementwise functions on Vec, and the activations an epilogue fuses.
#pragma once

#include "activation.h"
#include "vec.h"

namespace {

SNLP_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
SNLP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// exp(x) to 2 ulp: 2^n * p(r) with r = x - n ln 2, |r| <= ln 2 / 2 (Cephes' polynomial). Above 88.3 it is
// infinite, below -87.3 it stays at 1e-38; NaN passes through.
SNLP_INLINE Vec exp(Vec x) {
  const Vec clamped = min(max(x, splat(-87.3f)), splat(88.3f));
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = clamped * 1.44269504089f + round;
  const Vec n = shifted - round;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI exponent = ((VecI)shifted + (127 - 0x4b400000)) << 23;
  const Vec y = x > splat(88.3f) ? splat(__builtin_inff()) : p * (Vec)exponent;
  return x == x ? y : x;
}

// 2^x for x < 127, to 3e-7 of it; 2^-126 below -126, and NaN for NaN.
SNLP_INLINE Vec exp2_below(Vec x) {
  const Vec clamped = max(splat(-126.0f), x);
  const float round = 12582912.0f;
  const Vec shifted = clamped + round;
  const Vec r = clamped - (shifted - round);
  Vec p = splat(1.3400432e-3f);
  p = p * r + 9.6760371e-3f;
  p = p * r + 5.5503272e-2f;
  p = p * r + 2.4022107e-1f;
  p = p * r + 6.9314721e-1f;
  p = p * r + 1.0000000755f;
  return (Vec)((VecI)p + ((VecI)shifted << 23));
}

// erf(x) to 3e-7: x * P(x^2) / Q(x^2) on [-4, 4] (Eigen's rational fit), +-1 beyond; NaN passes through.
SNLP_INLINE Vec erf(Vec x) {
  const Vec s = x * x;
  Vec p = splat(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  Vec q = splat(-1.45660718464996e-05f);
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  const Vec sign = x > splat(4.0f) ? splat(1.0f) : splat(-1.0f);
  return s > splat(16.0f) ? sign : x * p / q;
}

// x (1 + erf(x / sqrt 2)) / 2 to 1.5e-4, for what is rounded to bfloat16 or int8 next: x (1/2 + x P(x^2)), a minimax fit on
// [-3.9, 3.9].
SNLP_INLINE Vec rough_gelu(Vec x) {
  const Vec c = min(max(x, splat(-3.9f)), splat(3.9f)), s = c * c;
  Vec p = splat(2.627064243e-08f);
  p = p * s + -1.770451187e-06f;
  p = p * s + 5.123637465e-05f;
  p = p * s + -8.445029496e-04f;
  p = p * s + 8.913741226e-03f;
  p = p * s + -6.486936937e-02f;
  p = p * s + 3.980855225e-01f;
  return x * (c * p + 0.5f);
}

template <int A>
SNLP_INLINE Vec activate(Vec x) {
  if (A == kRelu) return x < splat(0.0f) ? splat(0.0f) : x;
  if (A == kGelu) return 0.5f * x * (1.0f + erf(x * 0.70710678118f));
  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
  if (A == kGeluTanh) return x / (1.0f + exp(-1.59576912161f * (x + 0.044715f * x * x * x)));
  return x;
}

}  // namespace

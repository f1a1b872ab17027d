// What the gates of recurrent cells are made of: their sums and their two functions.
#pragma once

#include "../vec_math.h"

namespace {

SNLP_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// tanh(x) to 4 ulp: x P(x^2) / Q(x^2) on [-7.9, 7.9] (Eigen's rational fit), beyond which it is 1; NaN passes through.
SNLP_INLINE Vec tanh(Vec x) {
  const Vec c = min(max(x, splat(-7.90531111f)), splat(7.90531111f)), s = c * c;
  Vec p = splat(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Vec q = splat(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x == x ? c * p / q : x;
}

// What inputs and state add to gate `gate` of `wide` units from `unit` on, of sequence m, the biases included.
template <class E, class Cell>
SNLP_INLINE Vec from_input(const Cell& a, int gate, int64_t m, int64_t unit, int64_t wide) {
  return load_first((const E*)a.inputs + (m * a.kGates + gate) * a.H + unit, wide);
}

template <class E, class Cell>
SNLP_INLINE Vec from_state(const Cell& a, int gate, int64_t m, int64_t unit, int64_t wide) {
  const Vec sum = load_first((const E*)a.states[gate] + m * a.states_stride + unit - a.begin, wide);
  return a.bias ? sum + load_first((const E*)a.bias + gate * a.H + unit, wide) : sum;
}

}  // namespace

// What the gates of recurrent cells are made of: their sums and their two functions.
#pragma once

#include "../vec_math.h"

namespace {

// Divisions are what a cell waits for: where functions are multiplied, it divides once, by their denominators.

// 1 / sigmoid(x) = 1 + exp(-x), to 4e-7 of it, at most 2^126; NaN for NaN.
SNLP_INLINE Vec over_sigmoid(Vec x) { return 1.0f + exp2_below(min(splat(126.0f), x * -1.44269504f)); }

SNLP_INLINE Vec sigmoid(Vec x) { return 1.0f / over_sigmoid(x); }

// above / below
struct Ratio {
  Vec above, below;
};

// tanh(x) to 4 ulp: x P(x^2) / Q(x^2) on [-7.9, 7.9] (Eigen's rational fit), beyond which it is 1; NaN for NaN.
SNLP_INLINE Ratio tanh_ratio(Vec x) {
  const Vec c = min(splat(7.90531111f), max(splat(-7.90531111f), x)), s = c * c;
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
  return {c * p, q};
}

SNLP_INLINE Vec tanh(Vec x) {
  const Ratio ratio = tanh_ratio(x);
  return ratio.above / ratio.below;
}

// What inputs and state add to gate `gate` of `wide` units from `unit` on, of sequence m, the biases included.
template <class E, class Cell>
SNLP_INLINE Vec from_input(const Cell& a, int gate, int64_t m, int64_t unit, int64_t wide) {
  return load_first((const E*)a.inputs[gate] + m * a.inputs_stride + unit - a.begin, wide);
}

template <class E, class Cell>
SNLP_INLINE Vec from_state(const Cell& a, int gate, int64_t m, int64_t unit, int64_t wide) {
  const Vec sum = load_first((const E*)a.states[gate] + m * a.states_stride + unit - a.begin, wide);
  return a.bias ? sum + load_first((const E*)a.bias + gate * a.H + unit, wide) : sum;
}

}  // namespace

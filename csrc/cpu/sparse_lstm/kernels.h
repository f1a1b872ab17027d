// Lanes run over units; a unit's four gates meet in registers.
#pragma once

#include "gates.h"
#include "sparse_lstm.h"

namespace {

// `wide` units from `unit` on, of sequence m.
template <class E>
SNLP_INLINE void lstm_cell(const SparseLstm& a, int64_t m, int64_t unit, int64_t wide) {
  const int64_t at = m * a.H + unit;
  Vec sums[4];
  SNLP_UNROLL for (int gate = 0; gate < 4; gate++)
    sums[gate] = from_input<E>(a, gate, m, unit, wide) + from_state<E>(a, gate, m, unit, wide);
  const Vec over_i = over_sigmoid(sums[0]), over_f = over_sigmoid(sums[1]), over_o = over_sigmoid(sums[3]);
  const Ratio g = tanh_ratio(sums[2]);
  float* cell = a.c + m * (a.end - a.begin) + unit - a.begin;
  const Vec c = load_first(cell, wide) / over_f + g.above / (over_i * g.below);
  const Ratio squashed = tanh_ratio(c);
  const Vec h = squashed.above / (over_o * squashed.below);
  store_first(cell, c, wide);
  store_first((E*)a.h + at, h, wide);
  if (a.y) store_first((E*)a.y + m * a.y_stride + unit, h, wide);
  if (m >= a.ended) {
    store_first((E*)a.c_n + at, c, wide);
    if (a.h_n) store_first((E*)a.h_n + at, h, wide);
  }
  if (a.gates) {
    float* gates = a.gates + 4 * m * a.H + unit;
    store_first(gates, 1.0f / over_i, wide);
    store_first(gates + a.H, 1.0f / over_f, wide);
    store_first(gates + 2 * a.H, g.above / g.below, wide);
    store_first(gates + 3 * a.H, 1.0f / over_o, wide);
    store_first(a.cells + at, c, wide);
  }
}

template <class E>
void sparse_lstm(const SparseLstm a) {
  for (int64_t m = 0; m < a.M; m++) {
    int64_t unit = a.begin;
    for (; unit + kLanes <= a.end; unit += kLanes) lstm_cell<E>(a, m, unit, kLanes);
    if (unit < a.end) lstm_cell<E>(a, m, unit, a.end - unit);
  }
}

template <class E>
void sparse_lstm_grad(const SparseLstmGrad& a) {
  for (int64_t m = 0; m < a.M; m++)
    for (int64_t unit = a.begin; unit < a.end; unit += kLanes) {
      const int64_t wide = smaller(kLanes, a.end - unit), at = m * a.H + unit;
      const float* gates = a.gates + 4 * m * a.H + unit;
      const Vec i = load_first(gates, wide), f = load_first(gates + a.H, wide);
      const Vec g = load_first(gates + 2 * a.H, wide), o = load_first(gates + 3 * a.H, wide);
      const Vec before = m < a.known ? load_first(a.cells_before + at, wide) : load_first((const E*)a.c0 + at, wide);
      const Vec dh = load_first((const E*)a.grad_outputs + at, wide), squashed = tanh(load_first(a.cells + at, wide));
      const Vec dc = load_first(a.grad_c + at, wide) + dh * o * (1.0f - squashed * squashed);
      E* sums = (E*)a.grad_sums + 4 * m * a.H + unit;
      store_first(sums, dc * g * i * (1.0f - i), wide);
      store_first(sums + a.H, dc * before * f * (1.0f - f), wide);
      store_first(sums + 2 * a.H, dc * i * (1.0f - g * g), wide);
      store_first(sums + 3 * a.H, dh * squashed * o * (1.0f - o), wide);
      store_first(a.grad_c + at, dc * f, wide);
    }
}

}  // namespace

#define SNLP_SPARSE_LSTM(name, element)                                                       \
  void sparse_lstm_##name(const SparseLstm& a) { sparse_lstm<element>(a); }                   \
  void sparse_lstm_grad_##name(const SparseLstmGrad& a) { sparse_lstm_grad<element>(a); }

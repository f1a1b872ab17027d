// Lanes run over units; a unit's three gates meet in registers.
#pragma once

#include "../sparse_lstm/gates.h"
#include "sparse_gru.h"

namespace {

// `wide` units from `unit` on, of sequence m.
template <class E>
SNLP_INLINE void gru_cell(const SparseGru& a, int64_t m, int64_t unit, int64_t wide) {
  const int64_t at = m * a.H + unit;
  const Vec r = sigmoid(from_input<E>(a, 0, m, unit, wide) + from_state<E>(a, 0, m, unit, wide));
  const Vec z = sigmoid(from_input<E>(a, 1, m, unit, wide) + from_state<E>(a, 1, m, unit, wide));
  const Vec reset = from_state<E>(a, 2, m, unit, wide);
  const Vec n = tanh(from_input<E>(a, 2, m, unit, wide) + r * reset);
  const Vec h = n + z * (load_first((const E*)a.h + at, wide) - n);
  store_first((E*)a.h + at, h, wide);
  store_first((E*)a.y + m * a.y_stride + unit, h, wide);
  if (m >= a.ended) store_first((E*)a.h_n + at, h, wide);
  if (a.gates) {
    float* gates = a.gates + 4 * m * a.H + unit;
    store_first(gates, r, wide);
    store_first(gates + a.H, z, wide);
    store_first(gates + 2 * a.H, n, wide);
    store_first(gates + 3 * a.H, reset, wide);
  }
}

template <class E>
void sparse_gru(const SparseGru a) {
  for (int64_t m = 0; m < a.M; m++) {
    int64_t unit = a.begin;
    for (; unit + kLanes <= a.end; unit += kLanes) gru_cell<E>(a, m, unit, kLanes);
    if (unit < a.end) gru_cell<E>(a, m, unit, a.end - unit);
  }
}

template <class E>
void sparse_gru_grad(const SparseGruGrad& a) {
  for (int64_t m = 0; m < a.M; m++)
    for (int64_t unit = a.begin; unit < a.end; unit += kLanes) {
      const int64_t wide = smaller(kLanes, a.end - unit), at = m * a.H + unit;
      const float* gates = a.gates + 4 * m * a.H + unit;
      const Vec r = load_first(gates, wide), z = load_first(gates + a.H, wide);
      const Vec n = load_first(gates + 2 * a.H, wide), reset = load_first(gates + 3 * a.H, wide);
      const Vec before = m < a.known ? load_first((const E*)a.h_before + m * a.before_stride + unit, wide)
                                     : load_first((const E*)a.h0 + at, wide);
      const Vec dh = load_first((const E*)a.grad_outputs + at, wide);
      const Vec dn = dh * (1.0f - z) * (1.0f - n * n), dr = dn * reset * r * (1.0f - r);
      const Vec dz = dh * (before - n) * z * (1.0f - z);
      E *inputs = (E*)a.grad_inputs + 3 * m * a.H + unit, *states = (E*)a.grad_states + 3 * m * a.H + unit;
      store_first(inputs, dr, wide);
      store_first(inputs + a.H, dz, wide);
      store_first(inputs + 2 * a.H, dn, wide);
      store_first(states, dr, wide);
      store_first(states + a.H, dz, wide);
      store_first(states + 2 * a.H, dn * r, wide);
      store_first(a.grad_h + at, dh * z, wide);
    }
}

}  // namespace

#define SNLP_SPARSE_GRU(name, element)                                                        \
  void sparse_gru_##name(const SparseGru& a) { sparse_gru<element>(a); }                      \
  void sparse_gru_grad_##name(const SparseGruGrad& a) { sparse_gru_grad<element>(a); }

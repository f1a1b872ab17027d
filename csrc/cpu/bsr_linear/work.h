// How the work of a bsr_linear is measured and cut into parts of equal size.
#pragma once

#include "../vec.h"
#include "bsr_linear.h"

namespace {

constexpr int kEpilogueCost = 8;  // of a row, in units of one stored weight

// Work in rows [0, row): stored weights plus the epilogue. W: the weights, with crow, N, n and k named as in BsrLinear.
template <class W>
static inline int64_t cost_before(const W& a, int64_t row) {
  const int64_t block_row = row / a.n, inside = row % a.n;
  int64_t weights = (int64_t)a.crow[block_row] * a.n * a.k;
  if (inside) weights += inside * (a.crow[block_row + 1] - a.crow[block_row]) * a.k;
  return weights + row * kEpilogueCost;
}

// The first multiple of `step` rows before which at least `cost` of work lies.
template <class W>
static inline int64_t row_at_cost(const W& a, int64_t cost, int64_t step) {
  int64_t low = 0, high = (a.N + step - 1) / step;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost_before(a, smaller(middle * step, a.N)) < cost)
      low = middle + 1;
    else
      high = middle;
  }
  return smaller(low * step, a.N);
}

}  // namespace

// What the drivers of ops that end in a LayerNorm share: the result in double precision, and how far off a
// kernel may be.
#pragma once

#include <vector>

#include "check.h"

// A row before the LayerNorm.
struct Row {
  std::vector<double> values;
  double largest = 0;  // magnitude of what was added up
  int addends = 0;

  explicit Row(int64_t H) : values(H) {}
  void add(const Array& from, int64_t row) {
    addends++;
    for (size_t h = 0; h < values.size(); h++) {
      const double value = from.get(row * (int64_t)values.size() + (int64_t)h);
      values[h] += value;
      largest = fmax(largest, fabs(value));
    }
  }
};

// Compares row `at` of y with the LayerNorm of `row`; the first element that is off, or -1.
inline int64_t first_wrong(
    const Row& row, const Array& weight, const Array* bias, double eps, const Array& y, int64_t at, Dtype dtype) {
  const int64_t H = (int64_t)row.values.size();
  double mean = 0, variance = 0;
  for (double v : row.values) mean += v / (double)H;
  for (double v : row.values) variance += (v - mean) * (v - mean) / (double)H;
  const double deviation = sqrt(variance + eps);
  for (int64_t h = 0; h < H; h++) {
    const double normal = (row.values[h] - mean) / deviation * weight.get(h);
    const double expected = normal + (bias ? bias->get(h) : 0);
    // In units of the deviation. Only adding up loses what is small beside the largest magnitude: the mean does
    // not, however large it is.
    const double rounding = 1e-6 + 4 * 0x1p-24 * (row.addends - 1) * row.largest / deviation;
    const double tolerance =
        rounding * fabs(weight.get(h)) + 1e-6 * (fabs(normal) + fabs(expected)) + epsilon_of(dtype) * fabs(expected);
    if (!(fabs(y.get(at * H + h) - expected) <= tolerance)) return h;
  }
  return -1;
}

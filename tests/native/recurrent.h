// What the drivers of sparse_lstm and sparse_gru share: rows with gaps between them, and the comparison.
#pragma once

#include "check.h"

#include <vector>

inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// Rows of elements with poisoned gaps, filled with random numbers from `low` to `high`.
struct Rows {
  Array data;
  int64_t width, stride;

  Rows(Dtype dtype, int64_t rows, int64_t width, int64_t gap, Random& random, double low, double high)
      : data(dtype, rows * (width + gap)), width(width), stride(width + gap) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < width; i++) data.set(row * stride + i, random.uniform(low, high));
  }
  double operator()(int64_t row, int64_t i) const { return data.get(row * stride + i); }
};

// Compares results of one call, and sees that nothing beside them was written.
class Check {
 public:
  Check(const char* what, Dtype dtype, int isa, Failures& failures)
      : what_(what), dtype_(dtype), isa_(isa), failures_(failures) {}

  void expect(const char* name, const Array& got, Dtype stored, int64_t at, double expected, double scale = 1) const {
    const double tolerance = (1e-6 + 2 * epsilon_of(stored)) * (scale + fabs(expected));
    if (fabs(got.get(at) - expected) <= tolerance) return;
    failures_.add("%s %s %s: %s at %ld: expected %.9g within %.2g, got %.9g", what_, dtype_name(dtype_), isa_name(isa_),
                  name, (long)at, expected, tolerance, got.get(at));
  }
  // Elements of a poisoned array that no unit of [begin, end) owns, `gates` of them in a row of H each.
  void untouched(
      const char* name, const Array& got, int64_t rows, int64_t gates, int64_t H, int64_t begin, int64_t end) const {
    bool clean = got.front_untouched();
    for (int64_t i = 0; i < rows * gates * H; i++)
      if (i % H < begin || i % H >= end) clean = clean && isnan(got.get(i));
    if (!clean) failures_.add("%s %s %s: wrote beside %s", what_, dtype_name(dtype_), isa_name(isa_), name);
  }

 private:
  const char* what_;
  Dtype dtype_;
  int isa_;
  Failures& failures_;
};

// Random block-sparse projections, as encoder_layer and its parts take them.
#pragma once

#include <memory>
#include <vector>

#include "../../csrc/cpu/encoder_layer/encoder_layer.h"
#include "check.h"

typedef std::vector<double> Doubles;

// A random BSR matrix with every third block row empty, and the dense matrix of the same weights.
struct Matrix {
  int64_t N, K;
  int n, k;
  std::vector<int32_t> crow{0}, col;
  std::unique_ptr<Array> values, bias, scales;
  std::vector<int32_t> row_sums;
  Doubles dense;

  Matrix(int64_t rows, int64_t columns, int n, int k, Dtype dtype, Random& random)
      : N(rows), K(columns), n(n), k(k), row_sums(rows), dense(rows * columns) {
    for (int64_t row = 0; row < N / n; row++) {
      for (int64_t at = 0; at < K / k; at++)
        if (row % 3 != 1 && random.below(3) == 0) col.push_back((int32_t)at);
      crow.push_back((int32_t)col.size());
    }
    values = std::make_unique<Array>(dtype, (int64_t)col.size() * n * k);
    const double most = 2 / sqrt((double)(K ? K : 1));  // so that outputs are about as large as inputs
    values->fill(random, dtype == i8 ? -127 : -most, dtype == i8 ? 127 : most);
    bias = std::make_unique<Array>(f32, N);
    bias->fill(random, -0.5, 0.5);
    scales = std::make_unique<Array>(f32, N);
    scales->fill(random, 0.5 * most / 127, most / 127);
    for (int64_t row = 0; row < N; row++)
      for (int64_t p = crow[row / n]; p < crow[row / n + 1]; p++)
        for (int b = 0; b < k; b++) {
          const double w = values->get((p * n + row % n) * k + b);
          dense[row * K + (int64_t)col[p] * k + b] = dtype == i8 ? w * scales->get(row) : w;
        }
    col.shrink_to_fit();
  }

  Projection projection(Dtype dtype) {
    return {crow.data(), col.data(), values->data(), dtype == i8 ? (const float*)scales->data() : nullptr,
            (const float*)bias->data(), dtype == i8 ? row_sums.data() : nullptr, N, K, n, k};
  }

  // tokens x K -> tokens x N
  Doubles times(const Doubles& x, int64_t tokens) const {
    Doubles y(tokens * N);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t row = 0; row < N; row++) {
        double sum = bias->get(row);
        for (int64_t at = 0; at < K; at++) sum += dense[row * K + at] * x[t * K + at];
        y[t * N + row] = sum;
      }
    return y;
  }
};

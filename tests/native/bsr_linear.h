// bsr_linear in double precision: random problems, what they should give, and how far a kernel may be off.
#pragma once

#include <vector>

#include "activated.h"
#include "../../csrc/cpu/bsr_linear/bsr_linear.h"
#include "check.h"

struct Shape {
  int64_t M, N, K;
  int n, k;
};

// Which blocks are stored: all, none, or as many as each block row draws; every third row then has none.
struct Pattern {
  std::vector<int32_t> crow, col;

  Pattern(const Shape& s, double density, Random& random) : crow(s.N / s.n + 1) {
    std::vector<int32_t> found;
    for (int64_t row = 0; row < s.N / s.n; row++) {
      const double share = density == 0 || density == 1 ? density : row % 3 == 1 ? 0 : random.uniform(0, 2 * density);
      for (int64_t c = 0; c < s.K / s.k; c++)
        if (random.uniform(0, 1) < share) found.push_back((int32_t)c);
      crow[row + 1] = (int32_t)found.size();
    }
    col = std::vector<int32_t>(found.begin(), found.end());  // of exactly that capacity
  }
  int64_t blocks() const { return (int64_t)col.size(); }

  // f(position of the stored weight, row, column) for each of them.
  template <class F>
  void each(const Shape& s, F f) const {
    for (int64_t block_row = 0; block_row < s.N / s.n; block_row++)
      for (int64_t p = crow[block_row]; p < crow[block_row + 1]; p++)
        for (int j = 0; j < s.n; j++)
          for (int b = 0; b < s.k; b++)
            f((p * s.n + j) * s.k + b, block_row * s.n + j, (int64_t)col[p] * s.k + b);
  }
};

// A sum in double, and the sum of the magnitudes, which bounds its rounding error.
struct Sums {
  std::vector<double> value, magnitude;

  explicit Sums(int64_t count) : value(count), magnitude(count) {}
  void add(int64_t i, double term) {
    value[i] += term;
    magnitude[i] += fabs(term);
  }
};

// x as a kernel sees it: for int8 rounded, with the scale of each token, in the float arithmetic of the op.
struct Tokens {
  std::vector<double> x, scale;

  Tokens(const Array& given, const Shape& s, bool quantized, float input_scale) : x(s.M * s.K), scale(s.M, 1) {
    for (int64_t m = 0; m < s.M; m++) {
      float largest = 0;
      for (int64_t k = 0; k < s.K; k++) {
        const double value = x[m * s.K + k] = given.get(m * s.K + k);
        if (fabs(value) > largest || isnan(value)) largest = (float)fabs(value);
      }
      if (!quantized) continue;
      const float token = input_scale > 0 ? input_scale : largest == 0 ? 1.0f : largest / 127;
      scale[m] = isfinite(token) ? token : NAN;
      const float inverse = 1 / token;
      for (int64_t k = 0; k < s.K; k++)
        x[m * s.K + k] = nearbyintf(fminf(fmaxf((float)x[m * s.K + k] * inverse, -127), 127));
    }
  }
};

// How one call differs from another on the same problem.
enum Residual { kWithout, kApart, kInPlace, kResidualCount };
struct Options {
  bool bias;
  int residual, activation, parts;
  bool static_scale;
};

// A forward problem. For int8 the weights are int8 and everything else is `io`.
struct Problem {
  Shape s;
  Dtype weights, io;
  Pattern pattern;
  Array x, values, scales, bias, residual;
  static constexpr float kInputScale = 0.013f;  // saturates some of x

  Problem(Shape shape, Dtype weight_dtype, Dtype io_dtype, double density, Random& random)
      : s(shape), weights(weight_dtype), io(io_dtype), pattern(s, density, random), x(io, s.M * s.K),
        values(weights, pattern.blocks() * s.n * s.k), scales(f32, weights == i8 ? s.N : 0), bias(io, s.N),
        residual(io, s.M * s.N) {
    x.fill(random, -2, 2);
    if (s.M > 1)
      for (int64_t k = 0; k < s.K; k++) x.set(s.K * (s.M / 2) + k, 0);  // a token of zeros
    if (weights == i8)
      values.fill(random, -127.99, 127.99);
    else
      values.fill(random, -1, 1);
    scales.fill(random, 0.001, 0.01);
    bias.fill(random, -1, 1);
    residual.fill(random, -1, 1);
  }

  Sums sums(bool static_scale) const {
    const Tokens tokens(x, s, weights == i8, static_scale ? kInputScale : 0);
    Sums sums(s.M * s.N);
    pattern.each(s, [&](int64_t at, int64_t row, int64_t column) {
      const double weight = values.get(at);
      for (int64_t m = 0; m < s.M; m++) sums.add(m * s.N + row, weight * tokens.x[m * s.K + column]);
    });
    for (int64_t i = 0; weights == i8 && i < s.M * s.N; i++) {
      const double scale = tokens.scale[i / s.N] * scales.get(i % s.N);
      sums.value[i] *= scale;
      sums.magnitude[i] = fabs(sums.value[i]);  // int32 sums are exact, so only the product with the scale rounds
    }
    return sums;
  }

  BsrLinear arguments(const Options& options, Array& y) const {
    BsrLinear a{};
    a.x = x.data();
    a.crow = pattern.crow.data();
    a.col = pattern.col.data();
    a.values = values.data();
    a.scales = (const float*)scales.data();
    a.input_scale = weights == i8 && options.static_scale ? kInputScale : 0;
    a.bias = options.bias ? bias.data() : nullptr;
    a.residual = options.residual == kApart ? residual.data() : options.residual == kInPlace ? y.data() : nullptr;
    a.y = y.data();
    a.M = s.M;
    a.N = s.N;
    a.K = s.K;
    a.n = s.n;
    a.k = s.k;
    a.activation = options.activation;
    a.half = io == bf16;
    return a;
  }
};

// Half the last bit of each of `terms` sums and products, doubled since BFDOT rounds to odd in between.
inline double rounding(int64_t terms, double magnitude) { return 2 * (double)(terms + 8) * 0x1p-24 * magnitude; }

// Whether `got` may stand for `expected`: infinities and NaN alike where it is not finite.
inline bool close(double got, double expected, double tolerance) {
  return isfinite(expected) ? fabs(got - expected) <= tolerance : !isfinite(got);
}

// The gates of LSTM cells, forward and backward, on every instruction set that this CPU runs, against double precision;
// see bsr_linear.cpp.
#include "../../csrc/cpu/sparse_lstm/sparse_lstm.h"

#include "recurrent.h"

#define FORWARD(isa, dtype, suffix) SparseLstmKernel sparse_lstm_##dtype##_##suffix;
#define GRAD(isa, dtype, suffix) SparseLstmGradKernel sparse_lstm_grad_##dtype##_##suffix;
#include "../../csrc/cpu/sparse_lstm/sparse_lstm.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  SparseLstmKernel* run;
  SparseLstmGradKernel* grad;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) \
  {isa, dtype, sparse_lstm_##dtype##_##suffix, sparse_lstm_grad_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/sparse_lstm/sparse_lstm.inc"
};

Failures failures;

struct Shape {
  int64_t M, H, begin, end;
  bool bias, plain, save;  // plain: with y and h_n, without a projection after it
};

void forward(Entry& kernel, const Shape& s, Random& random) {
  const int64_t units = s.end - s.begin, gap = random.below(3);
  const Dtype dtype = kernel.dtype;
  const int64_t input_gap = random.below(3), ended = random.below(s.M + 1);
  Rows bias(dtype, 1, 4 * s.H, 0, random, -2, 2);
  std::vector<Rows> inputs, states;
  for (int gate = 0; gate < 4; gate++) inputs.emplace_back(dtype, s.M, units, input_gap, random, -6, 6);
  for (int gate = 0; gate < 4; gate++) states.emplace_back(dtype, s.M, units, gap, random, -6, 6);
  Array c(f32, s.M * units), c_n(dtype, s.M * s.H), h(dtype, s.M * s.H), y(dtype, s.M * s.H), h_n(dtype, s.M * s.H);
  Array gates(f32, 4 * s.M * s.H), cells(f32, s.M * s.H);
  for (int64_t i = 0; i < s.M * units; i++) c.set(i, random.uniform(-3, 3));
  const Array before(c);
  SparseLstm a{};
  for (int gate = 0; gate < 4; gate++) a.inputs[gate] = inputs[gate].data.data();
  for (int gate = 0; gate < 4; gate++) a.states[gate] = states[gate].data.data();
  a.bias = s.bias ? bias.data.data() : nullptr;
  a.c = (float*)c.data();
  a.c_n = c_n.data();
  a.h = h.data();
  a.y = s.plain ? y.data() : nullptr;
  a.h_n = s.plain ? h_n.data() : nullptr;
  a.gates = s.save ? (float*)gates.data() : nullptr;
  a.cells = s.save ? (float*)cells.data() : nullptr;
  a.M = s.M;
  a.H = s.H;
  a.inputs_stride = units + input_gap;
  a.states_stride = units + gap;
  a.y_stride = s.H;
  a.ended = ended;
  a.begin = s.begin;
  a.end = s.end;
  kernel.run(a);
  kernel.calls++;
  const Check check("sparse_lstm", dtype, kernel.isa, failures);
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t u = s.begin; u < s.end; u++) {
      double gate[4];
      for (int g = 0; g < 4; g++) {
        const double sum = inputs[g](m, u - s.begin) + states[g](m, u - s.begin) + (s.bias ? bias(0, g * s.H + u) : 0);
        gate[g] = g == 2 ? tanh(sum) : sigmoid(sum);
        if (s.save) check.expect("gates", gates, f32, (m * 4 + g) * s.H + u, gate[g]);
      }
      const int64_t at = m * s.H + u, own = m * units + u - s.begin;
      const double cell = gate[1] * before.get(own) + gate[0] * gate[2], out = gate[3] * tanh(cell);
      check.expect("c", c, f32, own, cell, 3);
      check.expect("h", h, dtype, at, out);
      if (s.plain) check.expect("y", y, dtype, at, out);
      if (m >= ended) check.expect("c_n", c_n, dtype, at, cell, 3);
      if (m >= ended && s.plain) check.expect("h_n", h_n, dtype, at, out);
      if (s.save) check.expect("cells", cells, f32, at, cell, 3);
    }
  for (const Array* result : {&c_n, &h_n}) {
    check.untouched("states", *result, ended, 1, s.H, s.H, 0);
    check.untouched("states", *result, s.M, 1, s.H, s.begin, s.end);
  }
  check.untouched("h", h, s.M, 1, s.H, s.begin, s.end);
  check.untouched("gates", gates, s.M, 4, s.H, s.save ? s.begin : s.H, s.save ? s.end : 0);
  check.untouched("y", y, s.M, 1, s.H, s.plain ? s.begin : s.H, s.plain ? s.end : 0);
}

void backward(Entry& kernel, const Shape& s, int64_t known, Random& random) {
  const Dtype dtype = kernel.dtype;
  Rows grad(dtype, s.M, s.H, 0, random, -2, 2), gates(f32, s.M, 4 * s.H, 0, random, 0, 1);
  Rows cells(f32, s.M, s.H, 0, random, -3, 3), before(f32, known, s.H, 0, random, -3, 3);
  Rows c0(dtype, s.M, s.H, 0, random, -3, 3);
  Array grad_c(f32, s.M * s.H), sums(dtype, 4 * s.M * s.H);
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t u = s.begin; u < s.end; u++) grad_c.set(m * s.H + u, random.uniform(-2, 2));
  const Array after(grad_c);
  SparseLstmGrad a{};
  a.grad_outputs = grad.data.data();
  a.gates = (const float*)gates.data.data();
  a.cells = (const float*)cells.data.data();
  a.cells_before = (const float*)before.data.data();
  a.c0 = c0.data.data();
  a.grad_c = (float*)grad_c.data();
  a.grad_sums = sums.data();
  a.M = s.M;
  a.H = s.H;
  a.known = known;
  a.begin = s.begin;
  a.end = s.end;
  kernel.grad(a);
  kernel.calls++;
  const Check check("sparse_lstm_grad", dtype, kernel.isa, failures);
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t u = s.begin; u < s.end; u++) {
      const double i = gates(m, u), f = gates(m, s.H + u), g = gates(m, 2 * s.H + u), o = gates(m, 3 * s.H + u);
      const double t = tanh(cells(m, u)), dh = grad(m, u), dc = after.get(m * s.H + u) + dh * o * (1 - t * t);
      const double c = m < known ? before(m, u) : c0(m, u);
      const double expected[] = {
          dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)};
      for (int gate = 0; gate < 4; gate++)
        check.expect("grad_sums", sums, dtype, (m * 4 + gate) * s.H + u, expected[gate], 4);
      check.expect("grad_c", grad_c, f32, m * s.H + u, dc * f, 4);
    }
  check.untouched("grad_sums", sums, s.M, 4, s.H, s.begin, s.end);
  check.untouched("grad_c", grad_c, s.M, 1, s.H, s.begin, s.end);
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {1, 1, 0, 1, true, true, false},    {1, 16, 0, 16, true, true, true},    {2, 37, 0, 37, true, true, true},
      {3, 64, 16, 48, true, true, true},  {2, 50, 32, 50, false, true, false}, {5, 23, 0, 23, true, false, true},
      {1, 128, 48, 48, true, true, false},
  };
  for (Entry& kernel : kernels) {
    if (!isa_supported(kernel.isa)) continue;
    Random random(7);
    for (const Shape& shape : shapes) {
      forward(kernel, shape, random);
      for (int64_t known : {int64_t{0}, shape.M / 2, shape.M}) backward(kernel, shape, known, random);
    }
  }
  return report("sparse_lstm", "cells", kernels, failures);
}

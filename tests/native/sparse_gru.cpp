// The gates of GRU cells, forward and backward, on every instruction set that this CPU runs, against double precision;
// see bsr_linear.cpp.
#include "../../csrc/cpu/sparse_gru/sparse_gru.h"

#include "recurrent.h"

#define FORWARD(isa, dtype, suffix) SparseGruKernel sparse_gru_##dtype##_##suffix;
#define GRAD(isa, dtype, suffix) SparseGruGradKernel sparse_gru_grad_##dtype##_##suffix;
#include "../../csrc/cpu/sparse_gru/sparse_gru.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  SparseGruKernel* run;
  SparseGruGradKernel* grad;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, sparse_gru_##dtype##_##suffix, sparse_gru_grad_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/sparse_gru/sparse_gru.inc"
};

Failures failures;

struct Shape {
  int64_t M, H, begin, end;
  bool bias, save;
};

void forward(Entry& kernel, const Shape& s, Random& random) {
  const int64_t units = s.end - s.begin, gap = random.below(3);
  const Dtype dtype = kernel.dtype;
  const int64_t input_gap = random.below(3), ended = random.below(s.M + 1);
  Rows bias(dtype, 1, 3 * s.H, 0, random, -2, 2);
  std::vector<Rows> inputs, states;
  for (int gate = 0; gate < 3; gate++) inputs.emplace_back(dtype, s.M, units, input_gap, random, -6, 6);
  for (int gate = 0; gate < 3; gate++) states.emplace_back(dtype, s.M, units, gap, random, -6, 6);
  Array h(dtype, s.M * s.H), y(dtype, s.M * s.H), h_n(dtype, s.M * s.H), gates(f32, 4 * s.M * s.H);
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t u = s.begin; u < s.end; u++) h.set(m * s.H + u, random.uniform(-1, 1));
  const Array before(h);
  SparseGru a{};
  for (int gate = 0; gate < 3; gate++) a.inputs[gate] = inputs[gate].data.data();
  for (int gate = 0; gate < 3; gate++) a.states[gate] = states[gate].data.data();
  a.bias = s.bias ? bias.data.data() : nullptr;
  a.h = h.data();
  a.y = y.data();
  a.h_n = h_n.data();
  a.gates = s.save ? (float*)gates.data() : nullptr;
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
  const Check check("sparse_gru", dtype, kernel.isa, failures);
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t u = s.begin; u < s.end; u++) {
      double state[3];
      for (int g = 0; g < 3; g++) state[g] = states[g](m, u - s.begin) + (s.bias ? bias(0, g * s.H + u) : 0);
      const int64_t at = m * s.H + u, own = u - s.begin;
      const double r = sigmoid(inputs[0](m, own) + state[0]), z = sigmoid(inputs[1](m, own) + state[1]);
      const double n = tanh(inputs[2](m, own) + r * state[2]), out = (1 - z) * n + z * before.get(at);
      for (const Array* result : {&h, &y}) check.expect("h", *result, dtype, at, out);
      if (m >= ended) check.expect("h_n", h_n, dtype, at, out);
      if (!s.save) continue;
      const double saved[] = {r, z, n, state[2]};
      for (int g = 0; g < 4; g++) check.expect("gates", gates, f32, (m * 4 + g) * s.H + u, saved[g]);
    }
  for (const Array* result : {&h, &y, &h_n}) check.untouched("h", *result, s.M, 1, s.H, s.begin, s.end);
  check.untouched("h_n", h_n, ended, 1, s.H, s.H, 0);
  check.untouched("gates", gates, s.M, 4, s.H, s.save ? s.begin : s.H, s.save ? s.end : 0);
}

void backward(Entry& kernel, const Shape& s, int64_t known, Random& random) {
  const Dtype dtype = kernel.dtype;
  const int64_t gap = random.below(3);
  Rows grad(dtype, s.M, s.H, 0, random, -2, 2), gates(f32, s.M, 4 * s.H, 0, random, 0, 1);
  Rows before(dtype, known, s.H, gap, random, -1, 1), h0(dtype, s.M, s.H, 0, random, -1, 1);
  Array inputs(dtype, 3 * s.M * s.H), states(dtype, 3 * s.M * s.H), past(f32, s.M * s.H);
  SparseGruGrad a{};
  a.grad_outputs = grad.data.data();
  a.gates = (const float*)gates.data.data();
  a.h_before = before.data.data();
  a.h0 = h0.data.data();
  a.grad_inputs = inputs.data();
  a.grad_states = states.data();
  a.grad_h = (float*)past.data();
  a.M = s.M;
  a.H = s.H;
  a.known = known;
  a.before_stride = s.H + gap;
  a.begin = s.begin;
  a.end = s.end;
  kernel.grad(a);
  kernel.calls++;
  const Check check("sparse_gru_grad", dtype, kernel.isa, failures);
  for (int64_t m = 0; m < s.M; m++)
    for (int64_t u = s.begin; u < s.end; u++) {
      const double r = gates(m, u), z = gates(m, s.H + u), n = gates(m, 2 * s.H + u), reset = gates(m, 3 * s.H + u);
      const double h = m < known ? before(m, u) : h0(m, u), dh = grad(m, u);
      const double dn = dh * (1 - z) * (1 - n * n), dr = dn * reset * r * (1 - r), dz = dh * (h - n) * z * (1 - z);
      const double by_input[] = {dr, dz, dn}, by_state[] = {dr, dz, dn * r};
      for (int g = 0; g < 3; g++) {
        check.expect("grad_inputs", inputs, dtype, (m * 3 + g) * s.H + u, by_input[g], 2);
        check.expect("grad_states", states, dtype, (m * 3 + g) * s.H + u, by_state[g], 2);
      }
      check.expect("grad_h", past, f32, m * s.H + u, dh * z, 2);
    }
  check.untouched("grad_inputs", inputs, s.M, 3, s.H, s.begin, s.end);
  check.untouched("grad_states", states, s.M, 3, s.H, s.begin, s.end);
  check.untouched("grad_h", past, s.M, 1, s.H, s.begin, s.end);
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {1, 1, 0, 1, true, false},   {1, 16, 0, 16, true, true},   {2, 37, 0, 37, true, true},
      {3, 64, 16, 48, true, true}, {2, 50, 32, 50, false, false}, {1, 128, 48, 48, true, true},
  };
  for (Entry& kernel : kernels) {
    if (!isa_supported(kernel.isa)) continue;
    Random random(7);
    for (const Shape& shape : shapes) {
      forward(kernel, shape, random);
      for (int64_t known : {int64_t{0}, shape.M / 2, shape.M}) backward(kernel, shape, known, random);
    }
  }
  return report("sparse_gru", "cells", kernels, failures);
}

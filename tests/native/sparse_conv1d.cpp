// Every kernel of sparse_conv1d that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/sparse_conv1d/sparse_conv1d.h"

#include <numeric>

#include "activated.h"
#include "projection.h"

#define FORWARD(isa, dtype, suffix) SparseConv1dKernel sparse_conv1d_##dtype##_##suffix;
#include "../../csrc/cpu/sparse_conv1d/sparse_conv1d.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  SparseConv1dKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, sparse_conv1d_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/sparse_conv1d/sparse_conv1d.inc"
};

Failures failures;

// x as a kernel sees it: for int8 rounded with the scale of its sequence.
Doubles inputs(const Array& x, const SparseConv1d& a, Dtype dtype) {
  Doubles all(a.B * a.L * a.C);
  for (int64_t b = 0; b < a.B; b++) {
    float largest = 0;
    for (int64_t i = 0; i < a.L * a.C; i++) largest = fmaxf(largest, fabsf((float)x.get(b * a.L * a.C + i)));
    const float scale = a.input_scale > 0 ? a.input_scale : largest == 0 ? 1.0f : largest / 127, inverse = 1 / scale;
    for (int64_t i = b * a.L * a.C; i < (b + 1) * a.L * a.C; i++)
      all[i] = dtype == i8 ? nearbyintf(fminf(fmaxf((float)x.get(i) * inverse, -127), 127)) * (double)scale : x.get(i);
  }
  return all;
}

// The windows of all outputs as rows [B * P][taps * C].
Doubles windows(const Doubles& x, const SparseConv1d& a) {
  Doubles rows(a.B * a.P * a.taps * a.C);
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t p = 0; p < a.P; p++)
      for (int64_t t = 0; t < a.taps; t++) {
        const int64_t at = p * a.stride + t * a.dilation - a.padding;
        for (int64_t c = 0; at >= 0 && at < a.L && c < a.C; c++)
          rows[((b * a.P + p) * a.taps + t) * a.C + c] = x[(b * a.L + at) * a.C + c];
      }
  return rows;
}

void run(SparseConv1d a, int64_t filters, int n, int k, Dtype dtype, int parts, Random& random) {
  const Dtype x_dtype = a.half ? bf16 : f32;
  Matrix weight(filters, a.taps * a.C, n, k, dtype, random);
  Array x(x_dtype, a.B * a.L * a.C);
  x.fill(random, -2, 2);
  Doubles expected = weight.times(windows(inputs(x, a, dtype), a), a.B * a.P);
  for (double& v : expected) v = activated(v, a.activation);
  a.x = x.data();
  a.weight = weight.projection(dtype);
  a.weight.row_sums = nullptr;
  for (Entry& kernel : kernels) {
    if (kernel.dtype != dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    Array y(x_dtype, a.B * a.P * filters);
    a.y = y.data();
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    if (!y.front_untouched()) failures.add("sparse_conv1d %s %s wrote in front of y", dtype_name(dtype), isa_name(kernel.isa));
    for (size_t i = 0; i < expected.size(); i++) {
      const double size = 1 + fabs(expected[i]), tolerance = (a.half ? 0x1p-8 : 1e-5) * size;
      if (fabs(y.get((int64_t)i) - expected[i]) <= tolerance) continue;
      failures.add("sparse_conv1d %s %s (x %s) %dx%d B=%ld L=%ld C=%ld N=%ld taps=%ld stride=%ld padding=%ld dilation=%ld T=%d "
                   "run=%ld parts=%d: at %zu expected %.9g, got %.9g",
                   dtype_name(dtype), isa_name(kernel.isa), dtype_name(x_dtype), n, k, (long)a.B, (long)a.L, (long)a.C,
                   (long)filters, (long)a.taps, (long)a.stride, (long)a.padding, (long)a.dilation, a.T, (long)a.run, parts, i,
                   expected[i], y.get((int64_t)i));
      break;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  const int blocks[][2] = {{8, 1}, {16, 1}, {4, 1}, {2, 1}, {1, 1}, {8, 2}, {4, 4}, {8, 4}, {1, 4}, {2, 3}, {16, 16}, {5, 2}};
  for (auto [n, k] : blocks)
    for (Dtype dtype : {f32, bf16, i8})
      for (bool half : {false, true})
        for (int repeat = 0; repeat < (quick ? 2 : 12); repeat++) {
          if ((dtype == i8 && k % 4) || (dtype != i8 && half != (dtype == bf16))) continue;
          SparseConv1d a{};
          a.taps = 1 + random.below(5);
          const int64_t least = std::lcm(k / std::gcd(k, a.taps), dtype == i8 ? 4 : 1);  // a block may reach into two taps
          a.C = least * (1 + random.below(least < 16 ? 40 / least : 2));
          a.stride = 1 + random.below(3);
          a.dilation = 1 + random.below(4);
          a.padding = random.below(6);
          const int64_t window = a.dilation * (a.taps - 1) + 1, behind = random.below(6);
          a.B = 1 + random.below(9);
          a.L = window + random.below(30);
          a.P = (a.L + a.padding + behind - window) / a.stride + 1;
          const int64_t common = std::gcd(a.stride, a.dilation);
          a.spacing = a.dilation / common;
          a.advance = a.stride / common;
          a.run = 1 + random.below(random.below(2) ? a.P : 3);
          a.T = random.below(2) ? 16 : 32;
          a.input_scale = random.below(2) ? 0.013f : 0;  // saturates some of x
          a.activation = (int)random.below(kActivationCount);
          a.half = half;
          const int parts[] = {1, 2, 3, 7};
          run(a, n * (1 + random.below(n < 16 ? 60 / n : 3)), n, k, dtype, parts[random.below(4)], random);
        }
  return report("sparse_conv1d", "forward", kernels, failures);
}

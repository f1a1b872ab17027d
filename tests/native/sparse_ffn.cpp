// Every kernel of sparse_ffn that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/sparse_ffn/sparse_ffn.h"

#include <numeric>

#include "activated.h"
#include "projection.h"

#define FORWARD(isa, dtype, suffix) SparseFfnKernel sparse_ffn_##dtype##_##suffix;
#include "../../csrc/cpu/sparse_ffn/sparse_ffn.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  SparseFfnKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, sparse_ffn_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/sparse_ffn/sparse_ffn.inc"
};

Failures failures;

struct Shape {
  int64_t M, H, F, N;
  int n, k, T, activation;
  bool half;
};

void run(const Shape& s, Dtype dtype, int parts, Random& random) {
  Matrix fc1(s.F, s.H, s.n, s.k, dtype, random), fc2(s.N, s.F, s.n, s.k, dtype, random);
  const Dtype x_dtype = s.half ? bf16 : f32;
  Array x(x_dtype, s.M * s.H);
  x.fill(random, -2, 2);
  Doubles in(s.M * s.H);
  for (size_t i = 0; i < in.size(); i++) in[i] = x.get((int64_t)i);
  Doubles hidden = fc1.times(in, s.M);
  for (double& v : hidden) v = activated(v, s.activation);
  const Doubles expected = fc2.times(hidden, s.M);
  for (Entry& kernel : kernels) {
    if (kernel.dtype != dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    Array y(x_dtype, s.M * s.N);
    SparseFfn a{};
    a.x = x.data();
    a.y = y.data();
    a.fc1 = fc1.projection(dtype);
    a.fc2 = fc2.projection(dtype);
    a.M = s.M;
    a.T = s.T;
    a.activation = s.activation;
    a.half = s.half;
    Scratch scratch(a.scratch());
    for (int phase : {kFfnSums, kFfnTiles})
      for (int part = parts; part-- > 0;) kernel.run(a, phase, part, parts, scratch.poisoned());
    if (!y.front_untouched()) failures.add("sparse_ffn %s %s wrote in front of y", dtype_name(dtype), isa_name(kernel.isa));
    // Exact arithmetic: every element. Rounded activations: all of them together, since errors add up by chance.
    double error = 0, size_of_all = 0, worst = 0;
    for (size_t i = 0; i < expected.size(); i++) {
      const double off = y.get((int64_t)i) - expected[i];
      error += off * off;
      size_of_all += expected[i] * expected[i];
      if (!(fabs(off) <= worst * (1 + fabs(expected[i])))) worst = fabs(off) / (1 + fabs(expected[i]));
    }
    const bool rounded = dtype == i8 || s.half;
    if (rounded ? sqrt(error) <= 0.03 * sqrt(size_of_all) : worst <= 1e-5) continue;
    failures.add("sparse_ffn %s %s %dx%d M=%ld H=%ld F=%ld N=%ld T=%d act=%d half=%d parts=%d: off by %.3g of all, %.3g at worst",
                 dtype_name(dtype), isa_name(kernel.isa), s.n, s.k, (long)s.M, (long)s.H, (long)s.F, (long)s.N, s.T,
                 s.activation, s.half, parts, sqrt(error / size_of_all), worst);
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
        for (int64_t M : {1, 15, 16, 17, 33, 70}) {
          if ((dtype == i8 && k % 4) || (quick && random.below(3))) continue;
          Shape s{};
          const int64_t unit = std::lcm(n, k);  // what all sides are multiples of
          s.M = M;
          s.H = unit * (1 + random.below(unit < 16 ? 48 / unit : 3));
          s.F = unit * random.below(unit < 16 ? 64 / unit : 4);
          s.N = unit * (1 + random.below(unit < 16 ? 48 / unit : 3));
          s.n = n;
          s.k = k;
          s.T = random.below(2) ? 16 : 32;
          s.activation = (int)random.below(kActivationCount);
          s.half = half;
          const int parts[] = {1, 2, 3, 7};
          run(s, dtype, parts[random.below(4)], random);
        }
  return report("sparse_ffn", "forward", kernels, failures);
}

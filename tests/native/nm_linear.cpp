// Every kernel of nm_linear that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/nm_linear/nm_linear.h"

#include <vector>

#include "activated.h"
#include "check.h"

#define FORWARD(isa, dtype, suffix) NmLinearKernel nm_linear_##dtype##_##suffix;
#include "../../csrc/cpu/nm_linear/nm_linear.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  NmLinearKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, nm_linear_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/nm_linear/nm_linear.inc"
};

Failures failures;

// Random values at random positions of each group, packed as NmLinear says.
struct Problem {
  int64_t M, N, K;
  int n, m;
  Dtype dtype;
  Array x, values, bias, residual;
  std::vector<int> position;    // of each value in its group
  std::vector<uint8_t> packed;  // of exactly that capacity

  Problem(int64_t tokens, int64_t rows, int64_t columns, int kept, int group, Dtype type, bool junk, Random& random)
      : M(tokens), N(rows), K(columns), n(kept), m(group), dtype(type), x(type, M * K), values(type, N * K / m * n),
        bias(type, N), residual(type, M * N), position(N * K / m * n) {
    x.fill(random, -2, 2);
    values.fill(random, -1, 1);
    bias.fill(random, -1, 1);
    residual.fill(random, -1, 1);
    NmLinear a = arguments(values);
    packed = std::vector<uint8_t>(N * a.packed_bytes(), 0);
    for (int64_t row = 0; row < N; row++)
      for (int64_t v = 0; v < a.row_values(); v += n) {
        int left = n;  // selection sampling: n of m positions, in order
        for (int p = 0, at = 0; p < m; p++)
          if (random.below(m - p) < left) {
            left--;
            position[row * a.row_values() + v + at++] = p;
          }
      }
    for (int64_t i = 0; i < (int64_t)position.size(); i++) {
      const int64_t row = i / a.row_values(), bit = i % a.row_values() * a.value_bits();
      packed[row * a.packed_bytes() + bit / 8] |= (uint8_t)(position[i] << bit % 8);
    }
    if (junk) memset(packed.data(), 0xff, packed.size());
  }

  NmLinear arguments(const Array& y) const {
    NmLinear a{};
    a.x = x.data();
    a.values = values.data();
    a.packed = packed.data();
    a.y = y.data();
    a.M = M;
    a.N = N;
    a.K = K;
    a.n = n;
    a.m = m;
    return a;
  }
};

void run(const Problem& problem, bool with_bias, bool with_residual, int activation, int parts, bool junk) {
  const int64_t per_row = problem.K / problem.m * problem.n;
  for (Entry& kernel : kernels) {
    if (kernel.dtype != problem.dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    Array y(problem.dtype, problem.M * problem.N);
    NmLinear a = problem.arguments(y);
    a.bias = with_bias ? problem.bias.data() : nullptr;
    a.residual = with_residual ? problem.residual.data() : nullptr;
    a.activation = activation;
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    if (!y.front_untouched()) failures.add("wrote in front of the result");
    if (junk) continue;  // any position: only memory is watched
    for (int64_t i = 0; i < problem.M * problem.N; i++) {
      const int64_t token = i / problem.N, row = i % problem.N;
      double sum = 0, magnitude = 0;
      for (int64_t v = 0; v < per_row; v++) {
        const int64_t k = v / problem.n * problem.m + problem.position[row * per_row + v];
        const double term = problem.values.get(row * per_row + v) * problem.x.get(token * problem.K + k);
        sum += term;
        magnitude += fabs(term);
      }
      sum += with_bias ? problem.bias.get(row) : 0;
      sum += with_residual ? problem.residual.get(i) : 0;
      const double expected = activated(sum, activation);
      const double tolerance = 2.4 * (double)(per_row + 8) * 0x1p-24 * (magnitude + 2) + 1e-6 * (1 + fabs(sum)) +
                               epsilon_of(problem.dtype) * fabs(expected);
      if (fabs(y.get(i) - expected) <= tolerance) continue;
      failures.add("nm_linear %s %s %d:%d M=%ld N=%ld K=%ld act=%d parts=%d: at [%ld][%ld] expected %.9g within %.2g, got %.9g",
                   dtype_name(problem.dtype), isa_name(kernel.isa), problem.n, problem.m, (long)problem.M, (long)problem.N,
                   (long)problem.K, activation, parts, (long)token, (long)row, expected, tolerance, y.get(i));
      break;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  const int patterns[][2] = {{2, 4}, {1, 4}, {4, 8}};
  std::vector<int64_t> Ms = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 64, 65, 130};
  if (quick) Ms = {1, 3, 8, 9, 33, 65};
  for (auto [n, m] : patterns)
    for (Dtype dtype : {f32, bf16})
      for (int64_t M : Ms)
        for (int64_t N : {1, 7, 16, 37})
          for (int64_t groups : {1, 3, 8, 21, 40}) {
            const bool junk = random.below(8) == 0;
            const Problem problem(M, N, groups * m, n, m, dtype, junk, random);
            const int parts[] = {1, 2, 3, 7};
            run(problem, random.below(2), random.below(2), (int)random.below(kActivationCount), parts[random.below(4)], junk);
          }
  return report("nm_linear", "forward", kernels, failures);
}

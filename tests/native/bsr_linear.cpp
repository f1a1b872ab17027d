// Every kernel of bsr_linear that this CPU runs, against double precision, without torch or Python, so that
// sanitizers and emulators see nothing but the kernels: `make sanitize`, `make emulate`.
//
//   bsr_linear [--quick]    --quick takes fewer sizes
//
// Prints a line per kernel; returns 1 after a wrong result.
#include "bsr_linear.h"

#include "bsr_linear_kernels.h"

#define FORWARD(isa, dtype, suffix)                       \
  BsrLinearPackKernel bsr_linear_pack_##dtype##_##suffix; \
  BsrLinearPackedKernel bsr_linear_packed_##dtype##_##suffix;
#include "../../csrc/cpu/bsr_linear/bsr_linear.inc"

namespace {

struct PackedEntry {
  int isa;
  Dtype dtype;
  BsrLinearPackKernel* pack;
  BsrLinearPackedKernel* run;
  int64_t calls, packed;
};

#define FORWARD(isa, dtype, suffix) \
  {isa, dtype, bsr_linear_pack_##dtype##_##suffix, bsr_linear_packed_##dtype##_##suffix, 0, 0},
PackedEntry packed_kernels[] = {
#include "../../csrc/cpu/bsr_linear/bsr_linear.inc"
};

constexpr int kParts[] = {1, 2, 3, 7};

// All shares, last first: none may need what another one leaves behind.
template <class Kernel, class Args>
void run(const Entry<Kernel>& kernel, const Args& a, int parts) {
  Scratch scratch(a.scratch());
  for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
}

void check(const Array& got, const std::vector<double>& expected, const std::vector<double>& tolerance, int64_t columns,
           const char* what) {
  if (!got.front_untouched()) failures.add("%s: wrote in front of the result", what);
  for (int64_t i = 0; i < (int64_t)expected.size(); i++)
    if (!close(got.get(i), expected[i], tolerance[i]))
      return failures.add("%s: at [%ld][%ld] expected %.9g within %.2g, got %.9g", what, (long)(i / columns),
                          (long)(i % columns), expected[i], tolerance[i], got.get(i));
}

// Every kernel on one problem with one set of options; `sums` are the problem's for options.static_scale.
void forward(const Problem& problem, const Sums& sums, const Options& options) {
  const Shape& s = problem.s;
  std::vector<double> expected(s.M * s.N), tolerance(s.M * s.N);
  for (int64_t i = 0; i < s.M * s.N; i++) {
    const double bias = options.bias ? problem.bias.get(i % s.N) : 0;
    const double residual = options.residual != kWithout ? problem.residual.get(i) : 0;
    const double sum = sums.value[i] + bias + residual;
    expected[i] = activated(sum, options.activation);
    const int64_t terms = problem.weights == i8 ? 0 : s.K;
    tolerance[i] = 1.2 * rounding(terms, sums.magnitude[i] + fabs(bias) + fabs(residual)) +
                   (options.activation >= kGelu ? 1e-6 * (1 + fabs(sum)) : 0) +
                   epsilon_of(problem.io) * fabs(expected[i]) + 1e-30;
  }
  each(forward_kernels, problem.weights, [&](Entry<BsrLinearKernel>& kernel) {
    Array y(problem.io, s.M * s.N);
    if (options.residual == kInPlace)
      for (int64_t i = 0; i < s.M * s.N; i++) y.set(i, problem.residual.get(i));
    run(kernel, problem.arguments(options, y), options.parts);
    char what[200];
    snprintf(what, sizeof what, "forward %s %s (x %s) M=%ld N=%ld K=%ld block %dx%d bias=%d residual=%d act=%d parts=%d static=%d",
             dtype_name(problem.weights), isa_name(kernel.isa), dtype_name(problem.io), (long)s.M, (long)s.N, (long)s.K,
             s.n, s.k, options.bias, options.residual, options.activation, options.parts, options.static_scale);
    check(y, expected, tolerance, s.N, what);
  });
}

Options random_options(Random& random) {
  return {random.below(2) != 0, (int)random.below(kResidualCount), (int)random.below(kActivationCount),
          kParts[random.below(4)], random.below(2) != 0};
}

double random_density(Random& random) {
  const double densities[] = {0.3, 0.3, 0.5, 0.1, 0, 1};
  return densities[random.below(6)];
}

Shape random_shape(int64_t M, int n, int k, Random& random) {
  const int64_t rows = 1 + random.below(n < 16 ? 48 / n : 3), columns = 1 + random.below(k < 20 ? 80 / k : 4);
  return {M, rows * n, columns * k, n, k};
}

bool valid(Dtype weights, int k) { return weights != i8 || k % 4 == 0; }

// f(dtype of the weights, of x) for each combination that there is.
template <class F>
void each_dtype(F f) {
  f(f32, f32);
  f(bf16, bf16);
  f(i8, f32);
  f(i8, bf16);
}

void forward_shapes(const std::vector<int>& ns, const std::vector<int>& ks, const std::vector<int>& Ms) {
  Random random(1);
  for (int n : ns)
    for (int k : ks)
      for (int M : Ms)
        each_dtype([&](Dtype weights, Dtype io) {
          if (!valid(weights, k)) return;
          const Problem problem(random_shape(M, n, k, random), weights, io, random_density(random), random);
          for (int repeat = 0; repeat < 2; repeat++) {
            const Options options = random_options(random);
            forward(problem, problem.sums(options.static_scale), options);
          }
        });
}

// Every combination of options on a few shapes.
void forward_options() {
  Random random(2);
  for (int64_t M : {3, 20})
    each_dtype([&](Dtype weights, Dtype io) {
      const Problem problem({M, 40, 48, 8, 4}, weights, io, 0.4, random);
      for (bool static_scale : {false, true}) {
        const Sums sums = problem.sums(static_scale);
        for (bool bias : {false, true})
          for (int residual = 0; residual < kResidualCount; residual++)
            for (int activation = 0; activation < kActivationCount; activation++)
              for (int parts : kParts) forward(problem, sums, {bias, residual, activation, parts, static_scale});
      }
    });
}

// Wide inputs: where the parts of the scratch lie depends on K more than on N.
void forward_wide(const std::vector<int>& ns, const std::vector<int>& ks) {
  Random random(3);
  for (int n : ns)
    for (int k : ks)
      for (int64_t M : {1, 8, 20})
        each_dtype([&](Dtype weights, Dtype io) {
          if (!valid(weights, k)) return;
          const Problem problem({M, n, 19200 / k * k, n, k}, weights, io, 0.01, random);
          forward(problem, problem.sums(false), {true, kWithout, kNone, 1, false});
        });
}

// Tokens that are not finite must show, and leave the others alone; so must a row's scale.
void forward_not_finite() {
  Random random(4);
  for (double value : {(double)NAN, (double)INFINITY, -(double)INFINITY})
    for (int k : {1, 2, 4})
      for (int64_t M : {1, 4, 8, 19, 66})
        each_dtype([&](Dtype weights, Dtype io) {
          if (!valid(weights, k)) return;
          Problem problem({M, 48, 48, 8, k}, weights, io, 0.4, random);
          problem.x.set((M - 1) * 48 + random.below(48), value);
          if (weights == i8) problem.scales.set(5, value);
          forward(problem, problem.sums(false), {true, kApart, kNone, kParts[random.below(4)], false});
        });
}

// int8 at the extremes: the most columns that the op takes, each product as large as it can be, and a row of
// zeros. 127 * 127 * 66308 (255 * 127 * 66308 before the shift of x is taken off) is below 2^31.
void forward_int8_bound() {
  const int64_t K = 66308;
  Random random(5);
  for (int64_t M : {1, 3, 8, 20})
    for (int sign : {1, -1}) {
      Problem problem({M, 8, K, 8, 4}, i8, f32, 1, random);
      for (int64_t i = 0; i < problem.x.size(); i++) problem.x.set(i, sign * 127.0);
      problem.pattern.each(problem.s, [&](int64_t at, int64_t row, int64_t) {
        problem.values.set(at, row == 2 ? 0 : row % 2 ? -127 : 127);
      });
      for (int64_t row = 0; row < 8; row++) problem.scales.set(row, 1);
      std::vector<double> expected(M * 8), tolerance(M * 8, 0);
      for (int64_t i = 0; i < M * 8; i++)
        expected[i] = i % 8 == 2 ? 0 : (float)((i % 2 ? -1.0 : 1.0) * sign * 127 * 127 * (double)K);
      each(forward_kernels, i8, [&](Entry<BsrLinearKernel>& kernel) {
        Array y(f32, M * 8);
        run(kernel, problem.arguments({false, kWithout, kNone, 1, false}, y), 1);
        check(y, expected, tolerance, 8, isa_name(kernel.isa));
      });
    }
}

// Some block rows, in any order, packed and then multiplied by some tokens, the last of which has `value` somewhere.
// What is not listed stays as it was.
void packed_rows(const Shape& s, Dtype weights, Dtype io, double value, Random& random) {
  Problem problem(s, weights, io, random_density(random), random);
  if (s.M) problem.x.set((s.M - 1) * s.K + random.below(s.K), value);
  const Sums sums = problem.sums(false);
  std::vector<int32_t> rows;
  for (int32_t row = (int32_t)(s.N / s.n); row-- > 0;)
    if (random.below(4)) rows.push_back(row);
  std::vector<bool> listed(s.N);
  for (int32_t row : rows) std::fill_n(listed.begin() + row * s.n, s.n, true);
  each(packed_kernels, weights, [&](PackedEntry& kernel) {
    Array y(io, s.M * s.N);
    const BsrLinear a = problem.arguments({false, kWithout, kNone, 1, false}, y);
    const size_t words = kernel.pack(a, rows.data(), (int64_t)rows.size(), nullptr);
    if (!words) return;
    kernel.packed++;
    Scratch packed(words), scratch(a.scratch());
    kernel.pack(a, rows.data(), (int64_t)rows.size(), packed.poisoned());
    kernel.run(a, packed.untouched(), scratch.poisoned());
    char what[200];
    snprintf(what, sizeof what, "packed %s %s (x %s) M=%ld N=%ld K=%ld block %dx%d", dtype_name(weights),
             isa_name(kernel.isa), dtype_name(io), (long)s.M, (long)s.N, (long)s.K, s.n, s.k);
    std::vector<double> expected(s.M * s.N, NAN), tolerance(s.M * s.N);
    for (int64_t i = 0; i < s.M * s.N; i++) {
      if (!listed[i % s.N]) continue;
      expected[i] = sums.value[i];
      tolerance[i] = 1.2 * rounding(weights == i8 ? 0 : s.K, sums.magnitude[i]) +
                     epsilon_of(io) * fabs(expected[i]) + 1e-30;
    }
    check(y, expected, tolerance, s.N, what);
  });
}

// The rows of a matrix as two that are linked, each with a y of its own.
void linked_matrices(const Shape& s, Dtype weights, Dtype io, Random& random) {
  const int64_t rows = s.N / s.n / 2 * s.n, others = s.N - rows;
  if (!rows) return;
  const Problem problem(s, weights, io, random_density(random), random);
  const Sums sums = problem.sums(false);
  each(forward_kernels, weights, [&](Entry<BsrLinearKernel>& kernel) {
    Array first(io, s.M * rows), second(io, s.M * others);
    BsrLinear a = problem.arguments({false, kWithout, kNone, 1, false}, first), b = a;
    Scratch scratch(a.scratch());
    a.N = rows;
    a.next = &b;
    b.crow += rows / s.n;
    if (b.scales) b.scales += rows;
    b.N = others;
    b.y = second.data();
    kernel.run(a, 0, 1, scratch.poisoned());
    char what[200];
    snprintf(what, sizeof what, "linked %s %s (x %s) M=%ld N=%ld K=%ld block %dx%d", dtype_name(weights),
             isa_name(kernel.isa), dtype_name(io), (long)s.M, (long)s.N, (long)s.K, s.n, s.k);
    for (const bool of_second : {false, true}) {
      const int64_t from = of_second ? rows : 0, count = of_second ? others : rows;
      std::vector<double> expected(s.M * count), tolerance(s.M * count);
      for (int64_t i = 0; i < s.M * count; i++) {
        const int64_t at = i / count * s.N + from + i % count;
        expected[i] = sums.value[at];
        tolerance[i] = 1.2 * rounding(weights == i8 ? 0 : s.K, sums.magnitude[at]) +
                       epsilon_of(io) * fabs(expected[i]) + 1e-30;
      }
      check(of_second ? second : first, expected, tolerance, count, what);
    }
  });
}

void linked_shapes() {
  Random random(9);
  for (int n : {1, 4, 8, 16})
    for (int k : {1, 2, 4, 8})
      for (int64_t M : {1, 3, 16, 40})
        each_dtype([&](Dtype weights, Dtype io) {
          if (valid(weights, k)) linked_matrices(random_shape(M, n, k, random), weights, io, random);
        });
}

void packed_shapes() {
  Random random(8);
  for (int n : {1, 4, 8, 12, 16, 32})
    for (int k : {1, 2, 4, 8})
      for (int64_t M = 1; M <= kPackedTokens; M++)
        each_dtype([&](Dtype weights, Dtype io) {
          if (!valid(weights, k)) return;
          for (double value : {0.5, (double)NAN})
            packed_rows(random_shape(M, n, k, random), weights, io, value, random);
        });
  // int8 blocks have a row of four or more, which is one word where a dot product takes four.
  const auto packs = [](const PackedEntry& kernel) {
    return kernel.dtype != i8 || kernel.isa == kAvx512Vnni || kernel.isa == kAvx2Vnni || kernel.isa == kNeonDot;
  };
  for (const PackedEntry& kernel : packed_kernels)
    if (isa_supported(kernel.isa) && packs(kernel) != (kernel.packed > 0))
      failures.add("packed %s %s: packed %ld problems", dtype_name(kernel.dtype), isa_name(kernel.isa),
                   (long)kernel.packed);
}

// dx and dvalues of one random problem.
void gradients(const Shape& s, Dtype dtype, int parts, Random& random) {
  const Pattern pattern(s, random_density(random), random);
  const int64_t weights = pattern.blocks() * s.n * s.k;
  Array grad(dtype, s.M * s.N), x(dtype, s.M * s.K), values(dtype, weights);
  for (Array* array : {&grad, &x, &values}) array->fill(random, -1, 1);
  Sums dx(s.M * s.K), dvalues(weights);
  pattern.each(s, [&](int64_t at, int64_t row, int64_t column) {
    for (int64_t m = 0; m < s.M; m++) {
      dx.add(m * s.K + column, grad.get(m * s.N + row) * values.get(at));
      dvalues.add(at, grad.get(m * s.N + row) * x.get(m * s.K + column));
    }
  });
  const auto tolerance = [](const Sums& sums, int64_t terms, Dtype result) {
    std::vector<double> all(sums.value.size());
    for (size_t i = 0; i < all.size(); i++)
      all[i] = rounding(terms, sums.magnitude[i]) + epsilon_of(result) * fabs(sums.value[i]);
    return all;
  };
  BsrLinearGrad a{};
  a.grad = grad.data();
  a.crow = pattern.crow.data();
  a.col = pattern.col.data();
  a.M = s.M;
  a.N = s.N;
  a.K = s.K;
  a.n = s.n;
  a.k = s.k;
  char what[200];
  const auto describe = [&](const char* name, int isa) {
    snprintf(what, sizeof what, "%s %s %s M=%ld N=%ld K=%ld block %dx%d parts=%d", name, dtype_name(dtype),
             isa_name(isa), (long)s.M, (long)s.N, (long)s.K, s.n, s.k, parts);
    return what;
  };
  each(dgrad_kernels, dtype, [&](Entry<BsrLinearGradKernel>& kernel) {
    BsrLinearGrad call = a;
    Array result(dtype, s.M * s.K);
    call.values = values.data();
    call.dx = result.data();
    run(kernel, call, parts);
    check(result, dx.value, tolerance(dx, s.N, dtype), s.K, describe("dgrad", kernel.isa));
  });
  each(wgrad_kernels, dtype, [&](Entry<BsrLinearGradKernel>& kernel) {
    BsrLinearGrad call = a;
    Array result(f32, weights);
    call.x = x.data();
    call.dvalues = (float*)result.data();
    run(kernel, call, parts);
    check(result, dvalues.value, tolerance(dvalues, s.M, f32), s.k, describe("wgrad", kernel.isa));
  });
}

void gradient_shapes(const std::vector<int>& ns, const std::vector<int>& ks, const std::vector<int>& Ms) {
  Random random(6);
  for (Dtype dtype : {f32, bf16}) {
    for (int n : ns)
      for (int k : ks)
        for (int M : Ms) gradients(random_shape(M, n, k, random), dtype, kParts[random.below(4)], random);
    for (const Shape& empty : {Shape{0, 16, 16, 8, 4}, Shape{5, 0, 16, 8, 4}, Shape{5, 16, 0, 8, 4}})
      gradients(empty, dtype, 2, random);
  }
}

// No inputs: what is left is act(bias + residual).
void forward_no_columns() {
  Random random(7);
  for (int64_t M : {1, 20})
    each_dtype([&](Dtype weights, Dtype io) {
      const Problem problem({M, 16, 0, 8, 4}, weights, io, 1, random);
      forward(problem, problem.sums(false), {true, kApart, kRelu, 2, false});
    });
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  if (count > 2 || (count == 2 && !quick)) {
    fprintf(stderr, "usage: %s [--quick]\n", arguments[0]);
    return 2;
  }
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::vector<int> ns = {1, 2, 3, 4, 8, 12, 16, 32, 64}, ks = {1, 2, 4, 5, 8, 16, 32};
  std::vector<int> Ms = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100};
  if (quick) Ms = {1, 7, 8, 9, 33};
  forward_shapes(ns, ks, Ms);
  forward_options();
  forward_wide({8}, quick ? std::vector<int>{2, 4} : ks);
  forward_not_finite();
  forward_int8_bound();
  forward_no_columns();
  gradient_shapes(ns, ks, Ms);
  linked_shapes();
  packed_shapes();
  print_calls("packed", packed_kernels);
  return verdict("bsr_linear");
}

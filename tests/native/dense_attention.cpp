// Every kernel of dense_attention that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/dense_attention/dense_attention.h"

#include <vector>

#include "check.h"

#define FORWARD(isa, dtype, suffix) DenseAttentionKernel dense_attention_##dtype##_##suffix;
#include "../../csrc/cpu/dense_attention/dense_attention.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  DenseAttentionKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, dense_attention_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/dense_attention/dense_attention.inc"
};

Failures failures;
constexpr double kScale = 0.4;

// Rows of queries, keys and values side by side; every third row belongs to no token, and is NaN.
struct Problem {
  Dtype dtype;
  int64_t heads, width, value_width, ld, rows = 0, side = 0;
  int T;
  std::vector<std::vector<int64_t>> sequences;  // rows of x
  std::vector<int32_t> source, positions;
  std::vector<int64_t> tiles{0}, lengths;
  Array x, bias;

  static int64_t rows_of(const std::vector<int64_t>& lengths) {
    int64_t count = 0;
    for (int64_t length : lengths) count += length + (length + 1) / 2;
    return count;
  }
  static int64_t longest(const std::vector<int64_t>& lengths) {
    int64_t most = 0;
    for (int64_t length : lengths) most = length > most ? length : most;
    return most + (most + 1) / 2;
  }

  Problem(const std::vector<int64_t>& all, int64_t h, int64_t d, int64_t e, int tile, Dtype type, Random& random)
      : dtype(type), heads(h), width(d), value_width(e), ld(h * (2 * d + e)), side(longest(all)), T(tile),
        lengths(all), x(type, rows_of(all) * ld), bias(f32, h * side * side) {
    bias.fill(random, -1, 1);
    for (int64_t length : lengths) {
      std::vector<int64_t> own;
      for (int32_t position = 0; (int64_t)own.size() < length; position++, rows++) {
        if (position % 3 == 2) continue;
        for (int64_t i = 0; i < ld; i++) x.set(rows * ld + i, random.uniform(-1, 1));
        own.push_back(rows);
        source.push_back((int32_t)rows);
        positions.push_back(position);
      }
      while (source.size() % T) source.push_back(-1), positions.push_back(0);
      tiles.push_back((int64_t)source.size() / T);
      sequences.push_back(own);
    }
  }

  // rows x heads * value_width; 0 where there is no token.
  std::vector<double> expected(bool biased) const {
    std::vector<double> y(rows * heads * value_width);
    for (const auto& own : sequences)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t q : own) {
          std::vector<double> p;
          double most = -1e300, total = 0;
          for (int64_t k : own) {
            double score = 0;
            for (int64_t d = head * width; d < (head + 1) * width; d++)
              score += x.get(q * ld + d) * x.get(k * ld + heads * width + d);
            score *= kScale;
            if (biased) score += bias.get((head * side + q - own[0]) * side + k - own[0]);
            p.push_back(score);
            most = score > most ? score : most;
          }
          for (double& score : p) total += score = exp(score - most);
          for (int64_t d = head * value_width; d < (head + 1) * value_width; d++)
            for (size_t j = 0; j < p.size(); j++)
              y[q * heads * value_width + d] += p[j] / total * x.get(own[j] * ld + 2 * heads * width + d);
        }
    return y;
  }
};

void run(const Problem& problem, bool biased, int parts) {
  const std::vector<double> expected = problem.expected(biased);
  for (Entry& kernel : kernels) {
    if (kernel.dtype != problem.dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    DenseAttention a{};
    a.T = problem.T;
    a.source = problem.source.data();
    a.positions = problem.positions.data();
    a.tiles = problem.tiles.data();
    a.lengths = problem.lengths.data();
    a.sequences = (int64_t)problem.lengths.size();
    for (int64_t length : problem.lengths)
      if (a.longest * a.T < length) a.longest = (length + a.T - 1) / a.T;
    a.position_bias = biased ? (const float*)problem.bias.data() : nullptr;
    a.side = problem.side;
    a.heads = (int)problem.heads;
    a.scale = (float)kScale;
    const size_t element = bytes_of(problem.dtype);
    a.query = problem.x.data();
    a.key = (const char*)a.query + problem.heads * problem.width * element;
    a.value = (const char*)a.key + problem.heads * problem.width * element;
    a.query_ld = a.key_ld = a.value_ld = problem.ld;
    a.query_width = problem.width;
    a.value_width = problem.value_width;
    a.half = problem.dtype == bf16;
    Array y(problem.dtype, (int64_t)expected.size());
    for (int64_t i = 0; i < y.size(); i++) y.set(i, 0);
    a.y = y.data();
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    if (!y.front_untouched())
      failures.add("dense_attention %s %s wrote in front of y", dtype_name(kernel.dtype), isa_name(kernel.isa));
    const double allowed = problem.dtype == bf16 ? 0.01 : 3e-6;
    for (size_t i = 0; i < expected.size(); i++) {
      if (fabs(y.get((int64_t)i) - expected[i]) <= allowed) continue;
      failures.add("dense_attention %s %s heads=%ld d=%ld e=%ld T=%d bias=%d sequences=%ld parts=%d: wrong at %ld, %.9g",
                   dtype_name(kernel.dtype), isa_name(kernel.isa), (long)problem.heads, (long)problem.width,
                   (long)problem.value_width, problem.T, biased, (long)problem.sequences.size(), parts, (long)i,
                   y.get((int64_t)i));
      break;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  const std::vector<int64_t> lengths[] = {{1}, {5, 0, 17}, {33}, {16, 16}, {3, 140, 2}, {40, 1, 1, 30}, {64, 129}};
  for (int64_t width : {1, 2, 3, 8, 17, 64, 256})
    for (Dtype dtype : {f32, bf16})
      for (const auto& length : lengths) {
        if (quick && random.below(3)) continue;
        const int64_t heads = 1 + random.below(3), value_width = random.below(3) ? width : 1 + random.below(40);
        const Problem problem(length, heads, width, value_width, random.below(2) ? 16 : 32, dtype, random);
        const int parts[] = {1, 2, 3, 7};
        run(problem, random.below(2), parts[random.below(4)]);
      }
  return report("dense_attention", "forward", kernels, failures);
}

// Every kernel of block_sparse_attention that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/block_sparse_attention/block_sparse_attention.h"

#include <vector>

#include "check.h"

#define FORWARD(isa, dtype, suffix) BlockSparseAttentionKernel block_sparse_attention_##dtype##_##suffix;
#define BACKWARD(isa, dtype, suffix) BlockSparseAttentionKernel block_sparse_attention_backward_##dtype##_##suffix;
#include "../../csrc/cpu/block_sparse_attention/block_sparse_attention.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  BlockSparseAttentionKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, block_sparse_attention_##dtype##_##suffix, 0},
Entry forward[] = {
#include "../../csrc/cpu/block_sparse_attention/block_sparse_attention.inc"
};
#define BACKWARD(isa, dtype, suffix) {isa, dtype, block_sparse_attention_backward_##dtype##_##suffix, 0},
Entry backward[] = {
#include "../../csrc/cpu/block_sparse_attention/block_sparse_attention.inc"
};

Failures failures;
constexpr double kScale = 0.4;

// Random blocks, a third of them each whole, with a pattern and absent; rows of queries, keys and values are NaN beyond
// their widths, and so is padding.
struct Problem {
  BlockSparseAttention a{};
  Dtype dtype;
  std::vector<int32_t> crow{0}, col, index;
  std::vector<uint8_t> patterns, padding;
  std::vector<TilePattern> tiles;
  Array query, key, value, grad, delta;
  std::vector<double> y, lse, grad_query, grad_key, grad_value;

  static Array rows(Dtype type, int64_t heads, int64_t length, int64_t width, Random& random) {
    Array t(type, heads * length * (width + 1));
    for (int64_t i = 0; i < t.size(); i++)
      if (i % (width + 1) < width) t.set(i, random.uniform(-1, 1));
    return t;
  }
  static AttentionRows view(const Array& t, int64_t heads, int64_t length, int64_t width) {
    return {t.data(), {heads * length * (width + 1), length * (width + 1), width + 1}};
  }

  Problem(int64_t queries, int64_t keys, int64_t group, int64_t width, int64_t value_width, int64_t rows_, int64_t columns,
          bool padded, Dtype type, Random& random)
      : dtype(type), query(rows(type, 2 * 2 * group, queries, width, random)), key(rows(type, 2 * 2, keys, width, random)),
        value(rows(type, 2 * 2, keys, value_width, random)), grad(rows(type, 2 * 2 * group, queries, value_width, random)),
        delta(f32, 2 * 2 * group * queries) {
    a.batch = 2;
    a.kv_heads = 2;
    a.heads = 2 * group;
    a.queries = queries;
    a.keys = keys;
    a.width = width;
    a.value_width = value_width;
    a.scale = (float)kScale;
    a.half = type == bf16;
    a.rows = rows_;
    a.columns = columns;
    a.T = rows_ % 32 == 0 && columns % 32 == 0 && queries > 16 ? 32 : 16;
    a.mask_heads = random.below(2) ? a.heads : 1;
    const int64_t block_columns = (keys + columns - 1) / columns;
    for (int64_t row = 0; row < a.mask_heads * a.block_rows(); row++) {
      for (int64_t j = 0; j < block_columns; j++) {
        const int64_t kind = random.below(3);
        if (kind == 0) continue;
        col.push_back((int32_t)j);
        index.push_back(kind == 1 ? -1 : (int32_t)(patterns.size() / (rows_ * columns)));
        const int64_t empty = random.below(rows_), full = random.below(columns);  // queries; keys of all the others
        for (int64_t i = 0; kind == 2 && i < rows_ * columns; i++)
          patterns.push_back((uint8_t)(i % rows_ >= empty && (i / rows_ < full || random.below(2))));
      }
      crow.push_back((int32_t)col.size());
    }
    a.crow_indices = crow.data();
    a.col_indices = col.data();
    a.pattern_indices = index.data();
    a.patterns = patterns.data();
    tiles.resize(patterns.size() / (a.T * a.T));
    find_tiles(a, (int64_t)patterns.size() / (rows_ * columns), tiles.data());
    a.tiles = tiles.data();
    if (padded) {
      for (int64_t i = 0; i < 2 * keys; i++) {
        padding.push_back((uint8_t)(random.below(3) > 0 && i != 0));
        for (int64_t head = 0; head < 2 && !padding.back(); head++) {
          const int64_t row = (i / keys * 2 + head) * keys + i % keys;
          for (int64_t d = 0; d < width; d++) key.set(row * (width + 1) + d, NAN);
          for (int64_t d = 0; d < value_width; d++) value.set(row * (value_width + 1) + d, NAN);
        }
      }
      a.key_mask = padding.data();
    }
    a.splits = 1 + random.below(4);
    a.query = view(query, a.heads, queries, width);
    a.key = view(key, 2, keys, width);
    a.value = view(value, 2, keys, value_width);
    a.grad = view(grad, a.heads, queries, value_width);
    delta.fill(random, -1, 1);
    a.delta = (const float*)delta.data();
    expect();
  }

  bool attends(int64_t batch, int64_t head, int64_t q, int64_t k) const {
    if (a.key_mask && !padding[batch * a.keys + k]) return false;
    const int64_t row = a.mask_row(head, q / a.rows);
    for (int32_t p = crow[row]; p < crow[row + 1]; p++)
      if (col[p] == k / a.columns)
        return index[p] < 0 || patterns[(index[p] * a.columns + k % a.columns) * a.rows + q % a.rows];
    return false;
  }

  void expect() {
    const int64_t D = a.width, E = a.value_width, H = a.heads;
    y.assign(2 * H * a.queries * E, 0);
    lse.assign(2 * H * a.queries, -INFINITY);
    grad_query.assign(2 * H * a.queries * D, 0);
    grad_key.assign(2 * 2 * a.keys * D, 0);
    grad_value.assign(2 * 2 * a.keys * E, 0);
    for (int64_t row = 0; row < 2 * H * a.queries; row++) {
      const int64_t batch = row / a.queries / H, head = row / a.queries % H, keys0 = (batch * 2 + head / (H / 2)) * a.keys;
      std::vector<double> scores(a.keys, -INFINITY);
      double most = -1e300, total = 0;
      for (int64_t k = 0; k < a.keys; k++) {
        if (!attends(batch, head, row % a.queries, k)) continue;
        scores[k] = 0;
        for (int64_t d = 0; d < D; d++)
          scores[k] += kScale * query.get(row * (D + 1) + d) * key.get((keys0 + k) * (D + 1) + d);
        most = scores[k] > most ? scores[k] : most;
      }
      for (double score : scores) total += exp(score - most);
      if (total == 0) continue;
      lse[row] = most + log(total);
      for (int64_t k = 0; k < a.keys; k++) {
        if (scores[k] == -INFINITY) continue;
        const double p = exp(scores[k] - lse[row]);
        double change = -delta.get(row);
        for (int64_t e = 0; e < E; e++) {
          const double v = value.get((keys0 + k) * (E + 1) + e), g = grad.get(row * (E + 1) + e);
          y[row * E + e] += p * v;
          grad_value[(keys0 + k) * E + e] += p * g;
          change += g * v;
        }
        for (int64_t d = 0; d < D; d++) {
          grad_query[row * D + d] += p * change * kScale * key.get((keys0 + k) * (D + 1) + d);
          grad_key[(keys0 + k) * D + d] += p * change * kScale * query.get(row * (D + 1) + d);
        }
      }
    }
  }
};

void check(const Problem& problem, const Entry& kernel, int parts, const char* what, const Array& got,
           const std::vector<double>& expected, double allowed) {
  const BlockSparseAttention& a = problem.a;
  if (!got.front_untouched())
    failures.add("block_sparse_attention %s %s wrote in front of %s", dtype_name(kernel.dtype), isa_name(kernel.isa), what);
  for (size_t i = 0; i < expected.size(); i++) {
    const double value = got.get((int64_t)i);
    if (value == expected[i] || fabs(value - expected[i]) <= allowed * (1 + fabs(expected[i]))) continue;
    failures.add("block_sparse_attention %s %s %ld x %ld heads=%ld d=%ld e=%ld block=%ldx%ld padding=%d parts=%d: %s wrong "
                 "at %ld, %.9g, not %.9g",
                 dtype_name(kernel.dtype), isa_name(kernel.isa), (long)a.queries, (long)a.keys, (long)a.heads, (long)a.width,
                 (long)a.value_width, (long)a.rows, (long)a.columns, a.key_mask != nullptr, parts, what, (long)i, value,
                 expected[i]);
    return;
  }
}

void run(Problem& problem, int parts) {
  BlockSparseAttention a = problem.a;
  Array y(problem.dtype, (int64_t)problem.y.size()), lse(f32, (int64_t)problem.lse.size());
  a.y = y.data();
  for (Entry& kernel : forward) {
    if (kernel.dtype != problem.dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    y.poison();
    lse.poison();
    a.lse = (float*)lse.data();
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    check(problem, kernel, parts, "y", y, problem.y, a.half ? 0.01 : 3e-6);
    check(problem, kernel, parts, "lse", lse, problem.lse, a.half ? 1e-5 : 3e-6);
  }
  for (size_t i = 0; i < problem.lse.size(); i++) lse.set((int64_t)i, problem.lse[i]);
  Array grad_query(problem.dtype, (int64_t)problem.grad_query.size()), grad_key(problem.dtype, (int64_t)problem.grad_key.size()),
      grad_value(problem.dtype, (int64_t)problem.grad_value.size());
  a.grad_query = grad_query.data();
  a.grad_key = grad_key.data();
  a.grad_value = grad_value.data();
  for (Entry& kernel : backward) {
    if (kernel.dtype != problem.dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    for (Array* grad : {&grad_query, &grad_key, &grad_value}) grad->poison();
    Scratch split_grads(a.splits > 1 ? a.batch * a.kv_heads * a.splits * a.grad_words() : 1);
    a.split_grads = a.splits > 1 ? split_grads.poisoned() : nullptr;
    a.adding = false;
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    a.adding = true;
    for (int part = parts; a.splits > 1 && part-- > 0;) kernel.run(a, part, parts, nullptr);
    const double allowed = a.half ? 0.01 : 2e-5;
    check(problem, kernel, parts, "grad_query", grad_query, problem.grad_query, allowed);
    check(problem, kernel, parts, "grad_key", grad_key, problem.grad_key, allowed);
    check(problem, kernel, parts, "grad_value", grad_value, problem.grad_value, allowed);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  const int64_t blocks[][2] = {{16, 16}, {32, 32}, {16, 48}, {64, 32}, {48, 16}};
  for (int64_t width : {1, 2, 3, 8, 17, 64, 128})
    for (Dtype dtype : {f32, bf16})
      for (const auto& block : blocks)
        for (int64_t queries : {1, 3, 17, 70}) {
          if (quick && random.below(4)) continue;
          const int64_t keys = 1 + random.below(150), value_width = random.below(3) ? width : 1 + random.below(40);
          Problem problem(queries, keys, 1 + random.below(2), width, value_width, block[0], block[1], random.below(2), dtype,
                          random);
          const int parts[] = {1, 2, 3, 7};
          run(problem, parts[random.below(4)]);
        }
  const int failed = report("block_sparse_attention", "forward", forward, failures);
  return report("block_sparse_attention", "backward", backward, failures) | failed;
}

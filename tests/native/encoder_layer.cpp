// Every kernel of encoder_layer that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/encoder_layer/encoder_layer.h"

#include <numeric>
#include <vector>

#include "activated.h"
#include "projection.h"

#define FORWARD(isa, dtype, suffix) EncoderLayerKernel encoder_layer_##dtype##_##suffix;
#define ROWS(isa, suffix) EncoderRowsKernel encoder_pack_##suffix, encoder_unpack_##suffix;
#include "../../csrc/cpu/encoder_layer/encoder_layer.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  EncoderLayerKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, encoder_layer_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/encoder_layer/encoder_layer.inc"
};

struct RowsEntry {
  int isa;
  EncoderRowsKernel *pack, *unpack;
};

#define ROWS(isa, suffix) {isa, encoder_pack_##suffix, encoder_unpack_##suffix},
const RowsEntry rows_kernels[] = {
#include "../../csrc/cpu/encoder_layer/encoder_layer.inc"
};

Failures failures;
Doubles normed(const Doubles& x, int64_t tokens, int64_t H, const Array& weight, const Array& bias, double eps) {
  Doubles y(tokens * H);
  for (int64_t t = 0; t < tokens; t++) {
    double mean = 0, variance = 0;
    for (int64_t h = 0; h < H; h++) mean += x[t * H + h] / (double)H;
    for (int64_t h = 0; h < H; h++) variance += (x[t * H + h] - mean) * (x[t * H + h] - mean) / (double)H;
    for (int64_t h = 0; h < H; h++)
      y[t * H + h] = (x[t * H + h] - mean) / sqrt(variance + eps) * weight.get(h) + bias.get(h);
  }
  return y;
}

struct Shape {
  std::vector<int64_t> lengths;
  std::vector<int64_t> query_rows, value_rows;
  int64_t H, F;
  int n, k, T;
  bool pre_norm, biased, half, masked_first;  // masked_first: nobody attends to the first of several tokens
  int activation;
  int64_t strange;  // sequence of NaN, which int8 does not round to a defined number; negative for none
};

struct Problem {
  Shape s;
  Dtype dtype;
  int64_t tokens = 0;
  Matrix query, key, value, output, fc1, fc2;
  Array norms, position_bias;
  std::vector<int32_t> source, first, last, position;
  std::vector<bool> compared;  // tokens that hold numbers
  Doubles x;
  static constexpr double kScale = 0.4, kEps = 1e-5;

  Problem(const Shape& shape, Dtype type, Random& random)
      : s(shape), dtype(type), query(s.query_rows.back(), s.H, s.n, s.k, type, random),
        key(s.query_rows.back(), s.H, s.n, s.k, type, random), value(s.value_rows.back(), s.H, s.n, s.k, type, random),
        output(s.H, s.value_rows.back(), s.n, s.k, type, random), fc1(s.F, s.H, s.n, s.k, type, random),
        fc2(s.H, s.F, s.n, s.k, type, random), norms(f32, 4 * s.H), position_bias(f32, heads() * side() * side()) {
    for (size_t sequence = 0; sequence < s.lengths.size(); sequence++) {
      const int32_t begin = (int32_t)tokens, length = (int32_t)s.lengths[sequence];
      for (int32_t i = 0; i < length; i++) {
        source.push_back((int32_t)tokens++);
        first.push_back(begin + (s.masked_first && length > 1));
        last.push_back(begin + length);
        position.push_back(i);
        compared.push_back((int64_t)sequence != s.strange);
      }
    }
    while (source.size() % s.T) {
      source.push_back(-1);
      first.push_back(first.back());
      last.push_back(last.back());
      position.push_back(position.back());
    }
    norms.fill(random, 0.5, 1.5);
    position_bias.fill(random, -1, 1);
    x.resize(tokens * s.H);
    for (int64_t i = 0; i < (int64_t)x.size(); i++)
      x[i] = compared[i / s.H] ? (double)(float)random.uniform(-2, 2) : (double)NAN;
  }

  int64_t heads() const { return (int64_t)s.query_rows.size() - 1; }
  int64_t side() const {
    int64_t longest = 1;
    for (int64_t length : s.lengths) longest = length > longest ? length : longest;
    return longest;
  }
  int64_t tiles() const { return (int64_t)source.size() / s.T; }
  Array norm(int i) const {
    Array part(f32, s.H);
    for (int64_t h = 0; h < s.H; h++) part.set(h, norms.get(i * s.H + h));
    return part;
  }

  Doubles attention(const Doubles& in) const {
    const Doubles q = query.times(in, tokens), k = key.times(in, tokens), v = value.times(in, tokens);
    const int64_t Q = query.N, V = value.N;
    Doubles context(tokens * V);
    for (int64_t head = 0; head < heads(); head++)
      for (int64_t t = 0; t < tokens; t++) {
        Doubles p;
        double most = -1e300, total = 0;
        for (int64_t j = first[t]; j < last[t]; j++) {
          double score = 0;
          for (int64_t d = s.query_rows[head]; d < s.query_rows[head + 1]; d++) score += q[t * Q + d] * k[j * Q + d];
          score *= kScale;
          if (s.biased) score += position_bias.get((head * side() + position[t]) * side() + position[j]);
          p.push_back(score);
          most = score > most ? score : most;
        }
        for (double& score : p) total += score = exp(score - most);
        for (int64_t d = s.value_rows[head]; d < s.value_rows[head + 1]; d++)
          for (size_t j = 0; j < p.size(); j++) context[t * V + d] += p[j] / total * v[(first[t] + j) * V + d];
      }
    return context;
  }

  Doubles expected() const {
    const auto ln = [&](const Doubles& in, int i) { return normed(in, tokens, s.H, norm(2 * i), norm(2 * i + 1), kEps); };
    Doubles h = output.times(attention(s.pre_norm ? ln(x, 0) : x), tokens);
    for (size_t i = 0; i < h.size(); i++) h[i] += x[i];
    if (!s.pre_norm) h = ln(h, 0);
    Doubles hidden = fc1.times(s.pre_norm ? ln(h, 1) : h, tokens);
    for (double& v : hidden) v = activated(v, s.activation);
    Doubles y = fc2.times(hidden, tokens);
    for (size_t i = 0; i < y.size(); i++) y[i] += h[i];
    return s.pre_norm ? y : ln(y, 1);
  }
};

// Packing and unpacking lose nothing.
void run_rows(const Problem& problem, int parts) {
  const Shape& s = problem.s;
  for (const RowsEntry& rows : rows_kernels) {
    if (!isa_supported(rows.isa)) continue;
    Array in(f32, problem.tokens * s.H), stream(f32, problem.tiles() * s.H * s.T), out(f32, problem.tokens * s.H);
    for (int64_t i = 0; i < in.size(); i++) in.set(i, problem.x[i]);
    EncoderRows a{in.data(), out.data(), (float*)stream.data(), problem.source.data(), problem.tiles(), s.H, s.T, false};
    Scratch none(a.scratch());
    for (int part = parts; part-- > 0;) rows.pack(a, part, parts, none.poisoned());
    for (int part = parts; part-- > 0;) rows.unpack(a, part, parts, none.poisoned());
    bool same = stream.front_untouched() && out.front_untouched();
    for (int64_t i = 0; i < in.size(); i++) same = same && (in.get(i) == out.get(i) || !problem.compared[i / s.H]);
    if (!same) failures.add("encoder_pack, encoder_unpack %s: T=%d H=%ld: not the same rows", isa_name(rows.isa), s.T, (long)s.H);
  }
}

void run_layer(Problem& problem, int parts) {
  const Shape& s = problem.s;
  const Doubles expected = problem.expected();
  const Array norms[] = {problem.norm(0), problem.norm(1), problem.norm(2), problem.norm(3)};
  const int64_t size = problem.tiles() * s.H * s.T;
  Array stream(f32, size);
  for (int64_t i = 0; i < size; i++) {
    const int64_t token = i / (s.H * s.T) * s.T + i % s.T, h = i / s.T % s.H;
    stream.set(i, token < problem.tokens ? problem.x[token * s.H + h] : 0);
  }
  for (Entry& kernel : kernels) {
    if (kernel.dtype != problem.dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    Array y(f32, size);
    EncoderLayer a{};
    a.x = (const float*)stream.data();
    a.y = (float*)y.data();
    a.spans = {problem.source.data(), problem.first.data(), problem.last.data()};
    a.query = problem.query.projection(problem.dtype);
    a.key = problem.key.projection(problem.dtype);
    a.value = problem.value.projection(problem.dtype);
    a.output = problem.output.projection(problem.dtype);
    a.fc1 = problem.fc1.projection(problem.dtype);
    a.fc2 = problem.fc2.projection(problem.dtype);
    a.norm1_weight = (const float*)norms[0].data();
    a.norm1_bias = (const float*)norms[1].data();
    a.norm2_weight = (const float*)norms[2].data();
    a.norm2_bias = (const float*)norms[3].data();
    a.query_rows = s.query_rows.data();
    a.value_rows = s.value_rows.data();
    a.positions = problem.position.data();
    a.position_bias = s.biased ? (const float*)problem.position_bias.data() : nullptr;
    a.side = problem.side();
    a.tiles = problem.tiles();
    a.tokens = problem.tokens;
    a.H = s.H;
    a.T = s.T;
    a.heads = (int)problem.heads();
    a.scale = (float)Problem::kScale;
    a.eps = (float)Problem::kEps;
    a.activation = s.activation;
    a.pre_norm = s.pre_norm;
    a.half = s.half;
    a.half_attention = s.half;
    for (int64_t row : s.query_rows) a.half_attention = a.half_attention && row % 2 == 0;
    const int64_t used = a.tiles * a.T;
    Array queries(f32, used * a.query.N), keys(f32, used * a.key.N), values(f32, used * a.value.N);
    a.queries = (float*)queries.data();
    a.keys = (float*)keys.data();
    a.values = (float*)values.data();
    std::vector<uint8_t> strange(a.tiles);
    a.strange = strange.data();
    Scratch scratch(a.scratch());
    for (int phase = 0; phase < kEncoderPhases; phase++)
      for (int part = parts; part-- > 0;) kernel.run(a, phase, part, parts, scratch.poisoned());
    if (!y.front_untouched() || !queries.front_untouched() || !keys.front_untouched() || !values.front_untouched())
      failures.add("encoder_layer %s %s wrote in front of an array", dtype_name(kernel.dtype), isa_name(kernel.isa));
    // Exact arithmetic: every element. Rounded activations: all of them together, since errors add up by chance.
    const bool rounded = problem.dtype == i8 || s.half;
    double error = 0, size_of_all = 0, worst = 0;
    for (int64_t i = 0; i < problem.tokens * s.H; i++) {
      if (!problem.compared[i / s.H]) continue;
      const double got = y.get((i / s.H / s.T * s.H + i % s.H) * s.T + i / s.H % s.T), off = got - expected[i];
      error += off * off;
      size_of_all += expected[i] * expected[i];
      if (!(fabs(off) <= worst * (1 + fabs(expected[i])))) worst = fabs(off) / (1 + fabs(expected[i]));
    }
    if (rounded ? sqrt(error) <= 0.06 * sqrt(size_of_all) : worst <= 2e-4) continue;
    failures.add("encoder_layer %s %s %dx%d H=%ld F=%ld heads=%d T=%d act=%d pre=%d bias=%d half=%d masked=%d strange=%ld parts=%d: off by %.3g of all, "
                 "%.3g at worst", dtype_name(kernel.dtype), isa_name(kernel.isa), s.n, s.k, (long)s.H, (long)s.F, a.heads, s.T,
                 s.activation, s.pre_norm, s.biased, s.half, s.masked_first, (long)s.strange, parts, sqrt(error / size_of_all), worst);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  const int blocks[][2] = {{8, 1}, {16, 1}, {4, 1}, {2, 1}, {1, 1}, {8, 2}, {4, 4}, {8, 4}, {1, 4}, {2, 3}, {16, 16}, {5, 2}};
  const std::vector<int64_t> lengths[] = {{1}, {5, 1, 17}, {33}, {16, 16}, {3, 140, 2}, {40, 1, 1, 30}};
  for (auto [n, k] : blocks)
    for (Dtype dtype : {f32, bf16, i8})
      for (const auto& length : lengths) {
        if ((dtype == i8 && k % 4) || (quick && random.below(3))) continue;
        Shape s{};
        s.lengths = length;
        s.n = n;
        s.k = k;
        const int64_t unit = std::lcm(n, k);  // what all sides are multiples of
        s.H = unit * (1 + random.below(unit < 16 ? 48 / unit : 3));
        s.F = unit * random.below(unit < 16 ? 64 / unit : 4);
        s.query_rows = s.value_rows = {0};
        for (int64_t heads = random.below(4); heads-- > 0;) {
          s.query_rows.push_back(s.query_rows.back() + unit * random.below(3));
          s.value_rows.push_back(s.value_rows.back() + unit * (1 + random.below(5)));
        }
        s.T = random.below(2) ? 16 : 32;
        s.pre_norm = random.below(2);
        s.biased = random.below(3) == 0;
        s.half = dtype != f32 && random.below(2);
        s.masked_first = random.below(3) == 0;
        s.strange = dtype == i8 ? -1 : (int64_t)random.below(2 * s.lengths.size()) - (int64_t)s.lengths.size();
        s.activation = (int)random.below(kActivationCount);
        Problem problem(s, dtype, random);
        const int parts[] = {1, 2, 3, 7};
        run_rows(problem, parts[random.below(4)]);
        run_layer(problem, parts[random.below(4)]);
      }
  return report("encoder_layer", "layer", kernels, failures);
}

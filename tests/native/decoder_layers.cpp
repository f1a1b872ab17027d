// What decoder_layers does beside the projections, phase by phase, on every instruction set that this CPU runs,
// against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/decoder_layers/decoder_layers.h"

#include <vector>

#include "../../csrc/cpu/activation.h"
#include "check.h"

#define FORWARD(isa, dtype, suffix) DecoderLayersKernel decoder_layers_##dtype##_##suffix;
#include "../../csrc/cpu/decoder_layers/decoder_layers.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  DecoderLayersKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, decoder_layers_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/decoder_layers/decoder_layers.inc"
};

Failures failures;

struct Call {
  Entry& kernel;
  int parts;

  void phase(const DecoderLayers& a, int phase) const {
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, phase, part, parts, scratch.poisoned());
    kernel.calls++;
  }

  void expect(const char* what, const DecoderLayers& a, const Array& got, int64_t i, double expected, double scale) const {
    const double tolerance = (2e-5 + epsilon_of(kernel.dtype)) * (scale + fabs(expected));
    if (fabs(got.get(i) - expected) <= tolerance) return;
    failures.add("decoder_layers %s %s %s batch=%ld length=%ld past=%ld H=%ld heads=%d/%d D=%d parts=%d: at %ld expected "
                 "%.9g within %.2g, got %.9g", what, dtype_name(kernel.dtype), isa_name(kernel.isa), (long)a.batch,
                 (long)a.length, (long)a.past, (long)a.H, a.heads, a.kv_heads, a.head_dim, parts, (long)i, expected,
                 tolerance, got.get(i));
  }
};

// kNormInner: the residual stream takes up what was projected, and is normalized.
void norm(const Call& call, int64_t tokens, int64_t H, bool layer_norm, Random& random) {
  const Dtype dtype = call.kernel.dtype;
  Array weight(dtype, H), bias(dtype, H), added(dtype, tokens * H), out(dtype, tokens * H);
  Array stream(f32, tokens * H), before(f32, tokens * H);
  for (Array* array : {&weight, &bias, &added}) array->fill(random, -2, 2);
  before.fill(random, -2, 2);
  for (int64_t i = 0; i < tokens * H; i++) stream.set(i, before.get(i));
  DecoderLayer layer{};
  layer.norm2 = {weight.data(), layer_norm ? bias.data() : nullptr};
  DecoderLayers a{};
  a.layers = &layer;
  a.layer_count = 1;
  a.batch = tokens;
  a.length = 1;
  a.H = H;
  a.eps = 1e-5f;
  a.projected = added.data();
  a.stream = (float*)stream.data();
  a.normed = out.data();
  call.phase(a, kNormInner);
  for (int64_t t = 0; t < tokens; t++) {
    double mean = 0, square = 0;
    const auto value = [&](int64_t j) { return before.get(t * H + j) + added.get(t * H + j); };
    if (layer_norm)
      for (int64_t j = 0; j < H; j++) mean += value(j) / H;
    for (int64_t j = 0; j < H; j++) square += (value(j) - mean) * (value(j) - mean) / H;
    for (int64_t j = 0; j < H; j++) {
      const double expected = (value(j) - mean) / sqrt(square + 1e-5) * weight.get(j) + (layer_norm ? bias.get(j) : 0);
      call.expect("norm", a, out, t * H + j, expected, 4);
      if (fabs(stream.get(t * H + j) - value(j)) > 1e-6) failures.add("decoder_layers: the stream is wrong");
    }
  }
  if (!out.front_untouched() || !stream.front_untouched()) failures.add("wrote in front of the result");
}

void linear(const BsrLinear&, int, int, float*) {}

void activation(const Call& call, int64_t tokens, int64_t inner, int code, bool gated, Random& random) {
  Array gate(call.kernel.dtype, tokens * inner), up(call.kernel.dtype, tokens * inner);
  gate.fill(random, -4, 4);
  up.fill(random, -4, 4);
  const Array before(up);
  DecoderLayer layer{};
  layer.inner = inner;
  layer.gate.run = gated ? linear : nullptr;
  DecoderLayers a{};
  a.layers = &layer;
  a.layer_count = 1;
  a.batch = tokens;
  a.length = 1;
  a.activation = code;
  a.gate = gate.data();
  a.up = up.data();
  call.phase(a, kActivate);
  for (int64_t i = 0; i < tokens * inner; i++) {
    const double x = gated ? gate.get(i) : before.get(i);
    double y = x / (1 + exp(-x));
    if (code == kRelu) y = x < 0 ? 0 : x;
    if (code == kGelu) y = 0.5 * x * (1 + erf(x * M_SQRT1_2));
    if (code == kGeluTanh) y = 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    call.expect("activation", a, up, i, gated ? y * before.get(i) : y, 1);
  }
  if (!up.front_untouched()) failures.add("wrote in front of the result");
}

struct Heads {
  int heads, kv_heads, dim;
};

// kAppend and kAttend on a cache of NaN but for the past.
void attention(const Call& call, int64_t batch, int64_t length, int64_t past, Heads h, bool rotary, bool masked, Random& random) {
  const Dtype dtype = call.kernel.dtype;
  const int64_t M = batch * length, D = h.dim, all = past + length, capacity = all + random.below(3), positions = 9;
  Array query(dtype, M * h.heads * D), key(dtype, M * h.kv_heads * D), value(dtype, M * h.kv_heads * D);
  Array cache(dtype, 2 * batch * h.kv_heads * capacity * D), out(dtype, M * h.heads * D);
  Array rope(f32, positions * D), mask(f32, batch * all);
  for (Array* array : {&query, &key, &value, &rope}) array->fill(random, -1, 1);
  for (int64_t i = 0; i < batch * all; i++) mask.set(i, random.below(3) ? 0 : -INFINITY);
  for (int64_t i = 0; masked && i < all; i++) mask.set(i, -INFINITY);  // the first sequence attends to nothing
  std::vector<int64_t> rows(M);
  for (int64_t& row : rows) row = random.below(positions);
  const auto at = [&](int which, int64_t sequence, int64_t head, int64_t position) {
    return (((which * batch + sequence) * h.kv_heads + head) * capacity + position) * D;
  };
  for (int which = 0; which < 2; which++)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t head = 0; head < h.kv_heads; head++)
        for (int64_t i = 0; i < past * D; i++) cache.set(at(which, b, head, 0) + i, random.uniform(-1, 1));
  DecoderLayer layer{};
  DecoderLayers a{};
  a.layers = &layer;
  a.layer_count = 1;
  a.batch = batch;
  a.length = length;
  a.past = past;
  a.capacity = capacity;
  a.heads = h.heads;
  a.kv_heads = h.kv_heads;
  a.head_dim = h.dim;
  a.scale = 0.5f;
  a.cache = cache.data();
  a.attended = out.data();
  a.rope = rotary ? (const float*)rope.data() : nullptr;
  a.positions = rows.data();
  a.mask = masked ? (const float*)mask.data() : nullptr;
  void* inputs[] = {query.data(), key.data(), value.data()};
  const int64_t strides[] = {h.heads * D, h.kv_heads * D, h.kv_heads * D};
  for (int i = 0; i < 3; i++) a.qkv[i] = inputs[i], a.qkv_stride[i] = strides[i];
  call.phase(a, kAppend);
  call.phase(a, kAttend);
  const auto rotated = [&](const Array& x, int64_t start, int64_t token, int64_t d) {
    if (!rotary) return x.get(start + d);
    const int64_t half = D / 2, pair = d % half;
    const double cos = rope.get(rows[token] * D + pair), sin = rope.get(rows[token] * D + half + pair);
    return d < half ? x.get(start + d) * cos - x.get(start + d + half) * sin : x.get(start + d) * cos + x.get(start + pair) * sin;
  };
  for (int64_t m = 0; m < M; m++)
    for (int64_t head = 0; head < h.kv_heads; head++)
      for (int64_t d = 0; d < D; d++) {
        const int64_t from = (m * h.kv_heads + head) * D, to = at(0, m / length, head, past + m % length) + d;
        call.expect("key", a, cache, to, rotated(key, from, m, d), 2);
        call.expect("value", a, cache, to + at(1, 0, 0, 0), value.get(from + d), 0);
      }
  for (int64_t m = 0; m < M; m++)
    for (int64_t head = 0; head < h.heads; head++) {
      const int64_t b = m / length, kv = head / (h.heads / h.kv_heads), count = past + m % length + 1;
      std::vector<double> weights(count);
      double total = 0;
      for (int64_t p = 0; p < count; p++) {
        double score = masked ? mask.get(b * all + p) : 0;
        for (int64_t d = 0; d < D; d++)
          score += 0.5 * rotated(query, (m * h.heads + head) * D, m, d) * cache.get(at(0, b, kv, p) + d);
        total += weights[p] = exp(score);
      }
      for (int64_t d = 0; d < D; d++) {
        double expected = 0;
        for (int64_t p = 0; p < count && total > 0; p++) expected += weights[p] / total * cache.get(at(1, b, kv, p) + d);
        call.expect("attention", a, out, (m * h.heads + head) * D + d, expected, 1);
      }
    }
  if (!out.front_untouched() || !cache.front_untouched()) failures.add("wrote in front of the result");
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  const Heads heads[] = {{4, 2, 6}, {2, 2, 10}, {3, 1, 16}, {2, 1, 20}, {4, 4, 32}, {3, 1, 64}, {2, 1, 80}, {1, 1, 128}, {1, 1, 256}};
  for (Entry& kernel : kernels) {
    if (!isa_supported(kernel.isa)) continue;
    for (int parts : {1, 2, 5}) {
      const Call call{kernel, parts};
      for (int64_t tokens : {1, 3})
        for (int64_t size : {1, 7, 16, 40, 67}) {
          norm(call, tokens, size, false, random);
          norm(call, tokens, size, true, random);
          for (int code : {(int)kSilu, (int)kRelu, (int)kGelu, (int)kGeluTanh}) activation(call, tokens, size, code, random.below(2), random);
        }
      for (const Heads& h : heads)
        for (int64_t past : {0, 1, 15, 33})
          for (int64_t length : {1, 4}) {
            if (quick && random.below(3)) continue;
            attention(call, 1 + random.below(2), length, past, h, random.below(2), random.below(2), random);
          }
    }
  }
  return report("decoder_layers", "phases", kernels, failures);
}

// The phases between the projections: norms, rotary positions, attention over the cache, the gate. Lanes run
// over features, except for scores, where they run over positions.
#pragma once

#include "../vec_math.h"
#include "attention.h"
#include "decoder_layers.h"

namespace {

// stream += projected (or = x, before the first layer), and out = its norm, of this part's tokens.
template <class E>
void normalize(const DecoderLayers& a, const DecoderNorm& norm, bool first, void* out, int part, int parts) {
  const int64_t M = a.tokens(), H = a.H;
  for (int64_t m = M * part / parts; m < M * (part + 1) / parts; m++) {
    float* stream = a.stream + m * H;
    const E* added = (const E*)(first ? a.x : a.projected) + m * H;
    Vec sum = {}, squares = {};
    for (int64_t j = 0; j < H; j += kLanes) {
      const int64_t wide = smaller(kLanes, H - j);
      Vec v = load_first(added + j, wide);
      if (!first) v += load_first(stream + j, wide);
      store_first(stream + j, v, wide);
      sum += v;
      squares += v * v;
    }
    float mean = 0;
    if (norm.bias) {
      mean = add_lanes(sum) / H;
      squares = Vec{};
      for (int64_t j = 0; j < H; j += kLanes) {
        const int64_t wide = smaller(kLanes, H - j);
        const Vec v = load_first(stream + j, wide) - mean;
        squares += wide == kLanes ? v * v : keep_first(v * v, wide);
      }
    }
    const float inverse = 1 / __builtin_sqrtf(add_lanes(squares) / H + a.eps);
    for (int64_t j = 0; j < H; j += kLanes) {
      const int64_t wide = smaller(kLanes, H - j);
      Vec v = (load_first(stream + j, wide) - mean) * inverse * load_first((const E*)norm.weight + j, wide);
      if (norm.bias) v += load_first((const E*)norm.bias + j, wide);
      store_first((E*)out + m * H + j, v, wide);
    }
  }
}

SNLP_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// up = act(gate) * up, or act(up) without a gate, in place.
template <class E, class Act>
SNLP_INLINE void activate_inner(const DecoderLayers& a, const DecoderLayer& layer, int part, int parts, Act act) {
  const bool gated = layer.gate.run;
  const int64_t count = a.tokens() * layer.inner, vectors = (count + kLanes - 1) / kLanes;
  E *up = (E*)a.up, *gate = (E*)a.gate;
  for (int64_t v = vectors * part / parts; v < vectors * (part + 1) / parts; v++) {
    const int64_t at = v * kLanes, wide = smaller(kLanes, count - at);
    const Vec u = load_first(up + at, wide);
    store_first(up + at, gated ? act(load_first(gate + at, wide)) * u : act(u), wide);
  }
}

template <class E>
void activate_inner(const DecoderLayers& a, const DecoderLayer& layer, int part, int parts) {
  switch (a.activation) {
    case kRelu: return activate_inner<E>(a, layer, part, parts, [](Vec x) { return activate<kRelu>(x); });
    case kGelu: return activate_inner<E>(a, layer, part, parts, [](Vec x) { return activate<kGelu>(x); });
    case kGeluTanh: return activate_inner<E>(a, layer, part, parts, [](Vec x) { return activate<kGeluTanh>(x); });
    default: return activate_inner<E>(a, layer, part, parts, [](Vec x) { return silu(x); });
  }
}

void project(const DecoderLinear& linear, int part, int parts, float* scratch) {
  if (linear.run) linear.run(linear.args, part, parts, scratch);
}

template <class E>
void decoder_layers(const DecoderLayers& a, int phase, int part, int parts, float* scratch) {
  const int index = phase / kDecoderPhases;
  if (index == a.layer_count) return normalize<E>(a, a.norm, index == 0, a.y, part, parts);
  const DecoderLayer& layer = a.layers[index];
  switch (phase % kDecoderPhases) {
    case kNormInput: return normalize<E>(a, layer.norm1, index == 0, a.normed, part, parts);
    case kProjectInputs:
      for (const DecoderLinear& input : layer.inputs) project(input, part, parts, scratch);
      return;
    case kAppend: return append<E>(a, index, part, parts);
    case kAttend: return attend<E>(a, index, part, parts, scratch);
    case kProjectOutput: return project(layer.output, part, parts, scratch);
    case kNormInner: return normalize<E>(a, layer.norm2, false, a.normed, part, parts);
    case kProjectInner:
      project(layer.gate, part, parts, scratch);
      return project(layer.up, part, parts, scratch);
    case kActivate: return activate_inner<E>(a, layer, part, parts);
    case kProjectDown: return project(layer.down, part, parts, scratch);
  }
}

}  // namespace

#define SNLP_DECODER_LAYERS(name, element)                                                                     \
  void decoder_layers_##name(const DecoderLayers& a, int phase, int part, int parts, float* scratch) {        \
    decoder_layers<element>(a, phase, part, parts, scratch);                                                   \
  }

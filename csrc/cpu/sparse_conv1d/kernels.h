// Windows of a sequence overlap, so x is transposed once for all taps: row r of a lane's run becomes [C][T], and the
// window of output q is the rows from q * advance on, which lie one after the other as the inputs of W do. The
// micro-kernels of bsr_linear multiply it like any other tile.
#pragma once

#include "../bsr_linear/work.h"
#include "../encoder_layer/project.h"
#include "sparse_conv1d.h"

namespace {

constexpr int kMostLanes = 32;

// What the lanes of a tile work on.
struct Runs {
  int32_t sequence[kMostLanes];  // -1 for a lane without one
  int64_t first[kMostLanes];     // output of the sequence
  int T;

  Runs(const SparseConv1d& a, int64_t tile) : T(a.T) {
    const int64_t of_sequence = a.lanes_of_sequence(), left = a.lanes() - tile * T;
    if (left <= 16) T = 16;
    for (int t = 0; t < T; t++) {
      const int64_t lane = tile * a.T + t, inside = lane % of_sequence;
      sequence[t] = t < left ? (int32_t)(lane / of_sequence) : -1;
      first[t] = inside % a.spacing + inside / a.spacing * a.run * a.spacing;
    }
  }

  // The rows of x that are number `row` of the runs, negative in the padding.
  void inputs(const SparseConv1d& a, int64_t row, int32_t* source) const {
    for (int t = 0; t < T; t++) {
      const int64_t at = first[t] * a.stride - a.padding + row * a.dilation;
      source[t] = sequence[t] < 0 || at < 0 || at >= a.L ? -1 : (int32_t)(sequence[t] * a.L + at);
    }
  }

  // The rows of y that are number q of the runs, negative behind the end of the sequence.
  void outputs(const SparseConv1d& a, int64_t q, int32_t* to) const {
    for (int t = 0; t < T; t++) {
      const int64_t at = first[t] + q * a.spacing;
      to[t] = sequence[t] < 0 || at >= a.P ? -1 : (int32_t)(sequence[t] * a.P + at);
    }
  }
};

// int8: the scale of each lane's sequence, and what to multiply by.
template <class E>
void sequence_scales(const SparseConv1d& a, const Runs& runs, float* scales, float* inverse) {
  for (int t = 0; t < runs.T; t++) {
    const int32_t sequence = runs.sequence[t];
    if (t > 0 && sequence == runs.sequence[t - 1]) {
      scales[t] = scales[t - 1];
    } else {
      scales[t] = a.input_scale > 0 ? a.input_scale : 1;
      const float most = sequence < 0 || a.input_scale > 0 ? 0 : largest((const E*)a.x + sequence * a.L * a.C, a.L * a.C);
      if (most != 0) scales[t] = most / 127;
    }
    inverse[t] = 1 / scales[t];
  }
}

// All rows of the runs, as the projection reads them; returns the words of one.
template <class D>
int64_t pack_runs(const SparseConv1d& a, const Runs& runs, const float* inverse, float* plain, float* words) {
  typedef typename D::Element E;
  const bool singles = takes_singles<D>(a.weight);
  const int64_t size = singles ? a.C * 16 : a.C / D::kUnit * runs.T;
  int32_t source[kMostLanes];
  for (int64_t row = 0; row < a.rows(); row++, words += size) {
    runs.inputs(a, row, source);
#if defined(__AVX512BF16__)
    if (singles) {
      pack_rows<Wide<E>>((const E*)a.x, a.C, source, a.C, runs.T, plain);
      rows_to_singles(plain, a.C, runs.T, words);
      continue;
    }
#endif
    pack_rows<D>((const E*)a.x, a.C, source, a.C, runs.T, words, inverse);
  }
  return size;
}

// The sums of `rows` rows of p, from row0 on, become outputs in place.
template <class D, int R, int Act>
void to_outputs(const Projection& p, const float* scales, int64_t row0, int64_t rows, float* out) {
  for (int64_t j = 0; j < rows; j++)
    SNLP_UNROLL for (int r = 0; r < R; r++) {
      float* at = out + (j * R + r) * kLanes;
      Vec v = D::template value<kLanes>((typename D::template Sum<kLanes>)load(at));
      if constexpr (D::kQuantized) v *= load(scales + r * kLanes) * p.scales[row0 + j];
      store(at, activate<Act>(v + p.bias[row0 + j]));
    }
}

template <class D, int R>
void to_outputs(int activation, const Projection& p, const float* scales, int64_t row0, int64_t rows, float* out) {
  switch (activation) {
    case kRelu: return to_outputs<D, R, kRelu>(p, scales, row0, rows, out);
    case kGelu: return to_outputs<D, R, kGelu>(p, scales, row0, rows, out);
    case kGeluTanh: return to_outputs<D, R, kGeluTanh>(p, scales, row0, rows, out);
    default: return to_outputs<D, R, kNone>(p, scales, row0, rows, out);
  }
}

// Filters [begin, end) of the outputs of one tile. 16 filters at a time meet all windows, so that their weights stay in
// the first-level cache.
template <class D, int R>
void one_tile(const SparseConv1d& a, const Runs& runs, int64_t begin, int64_t end, const int32_t* row_sums, float* scratch) {
  typedef typename D::Element E;
  constexpr int W = R * kLanes;
  float *scales = scratch, *plain = scales + 2 * runs.T, *words = plain + a.C * runs.T;
  if constexpr (D::kQuantized) sequence_scales<E>(a, runs, scales, scales + runs.T);
  const int64_t size = pack_runs<D>(a, runs, scales + runs.T, plain, words);
  Projection p = a.weight;
  p.crow += begin / p.n;
  p.bias += begin;
  if constexpr (D::kQuantized) p.scales += begin;
  alignas(64) float out[kGroup * W];
  int32_t to[kMostLanes];
  GroupFn<D>* group = choose_group<D, R>(p);
  const int64_t ld = takes_singles<D>(p) ? 16 : runs.T;
  for (int64_t row0 = 0; row0 < end - begin; row0 += kGroup) {
    const int64_t rows = smaller(kGroup, end - begin - row0);
    for (int64_t q = 0; q < a.run; q++) {
      runs.outputs(a, q, to);
      for (int t0 = 0; t0 < runs.T; t0 += W) {
        group(p, words + q * a.advance * size + t0, ld, row_sums + begin, row0, rows, out);
        to_outputs<D, R>(a.activation, p, scales + t0, row0, rows, out);
        unpack_rows(out, to + t0, rows, W, (E*)a.y + begin + row0, a.weight.N);
      }
    }
  }
}

// This part's share of (tiles x filters), cut by work.
template <class D>
void forward(const SparseConv1d& a, int part, int parts, float* scratch) {
  constexpr int R = 2;
  const Projection& p = a.weight;
  int32_t* row_sums = (int32_t*)scratch;
  float* rest = scratch + (p.N + 15) / 16 * 16;
  const int64_t step = p.n * ((15 + p.n) / p.n), per_tile = cost_before(p, p.N), all = a.tiles() * per_tile;
  const int64_t from = all * part / parts, to = all * (part + 1) / parts, first = from / per_tile;
  const auto filter_at = [&](int64_t cost, int64_t tile) { return row_at_cost(p, cost - tile * per_tile, step); };
  if constexpr (D::kShift != 0) {
    const bool whole = to > (first + 1) * per_tile;
    sum_rows<D>(p, whole ? 0 : filter_at(from, first), whole ? p.N : filter_at(to, first), row_sums);
  }
  for (int64_t tile = first; tile * per_tile < to; tile++) {
    const int64_t begin = filter_at(from, tile), end = filter_at(to, tile);
    if (begin >= end) continue;
    const Runs runs(a, tile);
    runs.T < R * kLanes ? one_tile<D, 1>(a, runs, begin, end, row_sums, rest)
                         : one_tile<D, R>(a, runs, begin, end, row_sums, rest);
  }
}

// bfloat16 weights: pairs if blocks have an even number of inputs, as a tap must, or one; else widened.
[[maybe_unused]] void forward_bfloat(const SparseConv1d& a, int part, int parts, float* scratch) {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  if (takes_singles<Bf16Dot>(a.weight) || (a.weight.k % 2 == 0 && a.C % 2 == 0)) return forward<Bf16Dot>(a, part, parts, scratch);
#endif
  forward<Bf16Wide>(a, part, parts, scratch);
}

template <template <class> class I8>
[[maybe_unused]] void forward_int8(const SparseConv1d& a, int part, int parts, float* scratch) {
  a.half ? forward<I8<bf16>>(a, part, parts, scratch) : forward<I8<float>>(a, part, parts, scratch);
}

}  // namespace

#define SNLP_FORWARD(name, ...) \
  void sparse_conv1d_##name(const SparseConv1d& a, int part, int parts, float* scratch) { __VA_ARGS__(a, part, parts, scratch); }

// A head of a sequence at a time: its keys and values become feature-major tiles, where lanes run over tokens, and stay
// in the second-level cache while tile after tile of its queries attends to them.
#pragma once

#include "../encoder_layer/attention.h"
#include "dense_attention.h"

namespace {

// One head of one sequence. P: how elements of a row become words of queries and keys, as A multiplies them.
template <class P, class A>
struct Head {
  typedef typename P::Element E;
  typedef typename A::Element V;
  const DenseAttention& a;
  const int32_t* source;
  int64_t head, length, query_rows[2], value_rows[2];
  AttentionTiles tiles;
  float *out, *scratch;

  Head(const DenseAttention& a, int64_t sequence, int64_t head, float* memory)
      : a(a), source(a.source + a.tiles[sequence] * a.T), head(head), length(a.lengths[sequence]), tiles() {
    query_rows[0] = value_rows[0] = 0;
    query_rows[1] = a.query_rows();
    value_rows[1] = a.value_width;
    tiles.positions = a.positions + a.tiles[sequence] * a.T;
    tiles.query_rows = query_rows;
    tiles.value_rows = value_rows;
    if (a.position_bias) tiles.position_bias = a.position_bias + head * a.side * a.side;
    tiles.side = a.side;
    tiles.T = a.T;
    tiles.heads = 1;
    tiles.scale = a.scale;
    tiles.queries = memory;
    tiles.keys = tiles.queries + a.longest * query_rows[1] * a.T;
    tiles.values = tiles.keys + a.longest * query_rows[1] * a.T;
    out = tiles.values + a.longest * a.value_width * a.T;
    scratch = out + a.value_width * a.T;
  }

  void pack_words(const void* x, int64_t ld, int64_t tile, float* to) const {
    to += tile * query_rows[1] * a.T;
    pack_rows<P>((const E*)x + head * a.query_width, ld, source + tile * a.T, a.query_width, a.T, to);
    const int64_t rest = query_rows[1] - a.query_width;
    if (A::kUnit == 1) memset(to + a.query_width * a.T, 0, rest * a.T * sizeof(float));
  }

  void pack_keys_and_values(int64_t tile) const {
    pack_words(a.key, a.key_ld, tile, tiles.keys);
    pack_rows<typename P::Scalar>(
        (const E*)a.value + head * a.value_width, a.value_ld, source + tile * a.T, a.value_width, a.T,
        (V*)(tiles.values + tile * a.value_width * a.T));
  }

  template <int R>
  void attend_lanes(int64_t tile, int t) const {
    Queries<R> q;
    for (int r = 0; r < R; r++) {
      q.first[r] = VecI{};
      q.last[r] = VecI{} + (int32_t)length;
    }
    q.all_from = q.any_from = 0;
    q.all_to = q.any_to = length;
    attend<A, R>(tiles, q, tile, t, 0, out, scratch);
  }

  // Queries of one tile; lanes without a token are at its end.
  void attend_tile(int64_t tile) const {
    pack_words(a.query, a.query_ld, tile, tiles.queries);
    const int64_t used = smaller(a.T, length - tile * a.T);
    for (int t = 0; t < used; t += 2 * kLanes) used - t > kLanes ? attend_lanes<2>(tile, t) : attend_lanes<1>(tile, t);
    unpack_rows(
        out, source + tile * a.T, a.value_width, a.T, (E*)a.y + head * a.value_width, a.heads * a.value_width);
  }
};

// A tile of queries costs as much as its sequence has tiles. A share is what begins in its range of costs.
template <class P, class A>
void dense_attention(const DenseAttention& a, int part, int parts, float* scratch) {
  int64_t total = 0, at = 0;
  for (int64_t s = 0; s < a.sequences; s++) {
    const int64_t count = a.tiles[s + 1] - a.tiles[s];
    total += a.heads * count * count;
  }
  const int64_t from = total * part / parts, to = total * (part + 1) / parts;
  for (int64_t s = 0; s < a.sequences; s++) {
    const int64_t count = a.tiles[s + 1] - a.tiles[s];
    for (int64_t head = 0; head < a.heads && count > 0; head++, at += count * count) {
      const int64_t first = at < from ? (from - at + count - 1) / count : 0;
      const int64_t last = at < to ? smaller(count, (to - at + count - 1) / count) : 0;
      if (first >= last) continue;
      const Head<P, A> one(a, s, head, scratch);
      for (int64_t tile = 0; tile < count; tile++) one.pack_keys_and_values(tile);
      for (int64_t tile = first; tile < last; tile++) one.attend_tile(tile);
    }
  }
}

}  // namespace

#define SNLP_FORWARD(name, ...)                                                                  \
  void dense_attention_##name(const DenseAttention& a, int part, int parts, float* scratch) {    \
    dense_attention<__VA_ARGS__>(a, part, parts, scratch);                                       \
  }

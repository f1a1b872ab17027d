// Forward: a tile of queries at a time meets the tiles of keys in the blocks of its block row, 128 keys between two
// looks at the maximum. Keys and values of a head become tiles once for all of its queries, and for all the query heads
// that share them.
#pragma once

#include "backward.h"
#include "few_queries.h"

namespace {

template <class P, class A>
struct Forward {
  typedef typename P::Element E;
  const BlockSparseAttention& a;
  Heads<P, A> heads;
  float *queries, *out, *context, *scores;

  Forward(const BlockSparseAttention& a, float* scratch) : a(a), heads(a, scratch) {
    queries = heads.rest;
    out = queries + a.width * a.T;
    context = out + a.value_width * a.T;
    scores = context + a.value_width * a.T;
  }

  // W queries, from lane t of their tile on, whose first is row `inside` of block row `row` of the mask.
  template <int R>
  void attend_lanes(int64_t row, int64_t inside, int t, int64_t used, float* lse) {
    constexpr int W = R * kLanes;
    const int T = a.T;
    Softmax<A, R> softmax(context, a.value_width);
    int64_t tiles[kChunk / 16];
    int count = 0;
    Vec before[R];
    auto flush = [&]() __attribute__((always_inline)) {
      softmax.weigh(scores, count * T, before);
      for (int i = 0; i < count; i++) softmax.add(scores + i * T / A::kUnit * W, heads.value_tile(tiles[i]), T);
      count = 0;
    };
    heads.for_tiles(row, inside, [&](int64_t tile, const uint8_t* pattern, const int32_t* real) __attribute__((always_inline)) {
      if (count == 0)
        for (int r = 0; r < R; r++) before[r] = softmax.largest[r];
      float* to_scores = scores + count * T * W;
      multiply_keys<A, R>(
          queries + t, heads.key_tile(tile), T, heads.words, [&](int j, int r, Vec sum) __attribute__((always_inline)) {
            Vec s = sum * (a.scale * kLog2e);
            if (pattern) s = attends(pattern + j * a.rows + t + r * kLanes) ? s : splat(kMasked);
            if (real && real[j] < 0) s = splat(kMasked);
            softmax.largest[r] = max(softmax.largest[r], s);
            store(to_scores + j * W + r * kLanes, s);
          });
      tiles[count++] = tile;
      if (count == kChunk / T) flush();
    });
    if (count) flush();
    for (int r = 0; r < R; r++) {
      const VecI empty = softmax.largest[r] == splat(kLowest);
      const Vec inverse = 1.0f / softmax.total[r];
      for (int64_t d = 0; d < a.value_width; d++) {
        const Vec sum = load(context + d * W + r * kLanes) * inverse;
        store(out + d * T + t + r * kLanes, empty ? Vec{} : sum);
      }
      for (int i = 0; i < smaller(kLanes, used - t - r * kLanes); i++)
        lse[t + r * kLanes + i] = empty[i] ? kMasked : softmax.largest[r][i] / kLog2e + __builtin_logf(softmax.total[r][i]);
    }
  }

  void attend_tile(int64_t batch, int64_t head, int64_t block_row, int64_t inside) {
    heads.select(batch, head / (a.heads / a.kv_heads));
    int32_t source[32];
    const int64_t first = block_row * a.rows + inside, used = rows_of_tile(a, first, source);
    pack_rows<P>(head_of<E>(a.query, batch, head), a.query.strides[2], source, a.width, a.T, queries);
    const int64_t row = a.mask_row(head, block_row), rows = (batch * a.heads + head) * a.queries;
    float* lse = a.lse + rows + first;
    for (int t = 0; t < used; t += 2 * kLanes)
      used - t > kLanes ? attend_lanes<2>(row, inside, t, used, lse) : attend_lanes<1>(row, inside, t, used, lse);
    unpack_rows(out, source, a.value_width, a.T, (E*)a.y + rows * a.value_width, a.value_width);
  }
};

// A tile of queries costs as much as its block row has blocks. A share is what begins in its range of costs.
template <class P, class A>
void block_sparse_attention(const BlockSparseAttention& a, int part, int parts, float* scratch) {
  if (a.few_queries()) return few_queries<typename P::Element>(a, part, parts, scratch);
  Forward<P, A> forward(a, scratch);
  auto tiles = [&](auto visit) {
    int64_t at = 0;
    for (int64_t batch = 0; batch < a.batch; batch++)
      for (int64_t head = 0; head < a.heads; head++)
        for (int64_t block_row = 0; block_row < a.block_rows(); block_row++) {
          const int64_t row = a.mask_row(head, block_row);
          const int64_t end = smaller(a.rows, a.queries - block_row * a.rows);
          for (int64_t inside = 0; inside < end; inside += a.T) {
            visit(at, batch, head, block_row, inside);
            at += 1 + a.crow_indices[row + 1] - a.crow_indices[row];
          }
        }
    return at;
  };
  const int64_t total = tiles([](auto...) {}), from = total * part / parts, to = total * (part + 1) / parts;
  tiles([&](int64_t at, auto... tile) {
    if (from <= at && at < to) forward.attend_tile(tile...);
  });
}

}  // namespace

#define SNLP_FORWARD(name, ...)                                                                                     \
  void block_sparse_attention_##name(const BlockSparseAttention& a, int part, int parts, float* scratch) {          \
    block_sparse_attention<__VA_ARGS__>(a, part, parts, scratch);                                                   \
  }
#define SNLP_BACKWARD(name, ...)                                                                                    \
  void block_sparse_attention_backward_##name(const BlockSparseAttention& a, int part, int parts, float* scratch) { \
    block_sparse_attention_backward<__VA_ARGS__>(a, part, parts, scratch);                                          \
  }

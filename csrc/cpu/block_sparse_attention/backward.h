// Backward, in float: probabilities come again from the scores and their log-sum-exp. Lanes run over queries for the
// scores and the gradient of the queries, over features for the gradients of keys and values, which add up in scratch
// over all the queries of a head and all the query heads that share it. Where there are few heads of keys, their queries
// are split, and a second call adds up the gradients of the splits: always in the same order, whoever computed them.
#pragma once

#include "heads.h"

namespace {

// sums[J][width] += weights[J][W] times rows[W][width], for N vectors.
template <int J, int N, int W>
SNLP_INLINE void add_rows(const float* weights, const float* rows, int64_t width, float* sums) {
  Vec sum[J][N];
  SNLP_UNROLL for (int j = 0; j < J; j++)
    SNLP_UNROLL for (int n = 0; n < N; n++) sum[j][n] = load(sums + j * width + n * kLanes);
  for (int w = 0; w < W; w++) {
    Vec row[N];
    SNLP_UNROLL for (int n = 0; n < N; n++) row[n] = load(rows + w * width + n * kLanes);
    SNLP_UNROLL for (int j = 0; j < J; j++) {
      const Vec weight = splat_word(weights + j * W + w);
      SNLP_UNROLL for (int n = 0; n < N; n++) sum[j][n] += weight * row[n];
    }
  }
  SNLP_UNROLL for (int j = 0; j < J; j++)
    SNLP_UNROLL for (int n = 0; n < N; n++) store(sums + j * width + n * kLanes, sum[j][n]);
}

// The same for T keys and all of a width that is a multiple of 16.
template <int W>
SNLP_INLINE void add_tile(const float* weights, const float* rows, int T, int64_t width, float* sums) {
  constexpr int J = 4, N = kRegisters == 32 ? 4 : 2;
  for (int j = 0; j < T; j += J) {
    int64_t d = 0;
    for (; d + N * kLanes <= width; d += N * kLanes)
      add_rows<J, N, W>(weights + j * W, rows + d, width, sums + j * width + d);
    for (; d < width; d += kLanes) add_rows<J, 1, W>(weights + j * W, rows + d, width, sums + j * width + d);
  }
}

SNLP_INLINE int64_t cost_of_row(const BlockSparseAttention& a, int64_t head, int64_t block_row) {
  const int64_t row = a.mask_row(head, block_row);
  return 1 + a.crow_indices[row + 1] - a.crow_indices[row];
}

// Of the queries of all heads that share keys.
SNLP_INLINE int64_t cost_of_head(const BlockSparseAttention& a, int64_t kv_head) {
  const int64_t group = a.heads / a.kv_heads;
  int64_t cost = group * a.block_rows();
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
    cost += a.crow_indices[a.mask_row(head, a.block_rows())] - a.crow_indices[a.mask_row(head, 0)];
  return cost;
}

// The gradients of keys [from, to) of a head, and of their values: the sums over `splits`, in order.
template <class E>
void store_grads(const BlockSparseAttention& a, int64_t unit, int64_t from, int64_t to, const float* grads, int64_t splits) {
  for (int64_t key = from; key < to;) {
    const int64_t tile = key / a.T, last = smaller(to, (tile + 1) * a.T);
    const float* parts[kMostSplits];
    int count = 0;
    for (int64_t split = 0; split < splits; split++) {
      const float* all = grads + split * a.grad_words();
      if (((const int32_t*)(all + a.key_tiles() * a.tile_words()))[tile]) parts[count++] = all + tile * a.tile_words();
    }
    auto store_row = [&](int64_t at, int64_t size, E* y) __attribute__((always_inline)) {
      for (int64_t d = 0; d < size; d += kLanes) {
        Vec sum = {};
        for (int i = 0; i < count; i++) sum += load(parts[i] + at + d);
        store_first(y + d, sum, smaller(kLanes, size - d));
      }
    };
    for (; key < last; key++) {
      const int64_t row = unit * a.keys + key, inside = key % a.T;
      store_row(inside * a.padded_width(), a.width, (E*)a.grad_key + row * a.width);
      store_row(
          a.T * a.padded_width() + inside * a.padded_value_width(), a.value_width, (E*)a.grad_value + row * a.value_width);
    }
  }
}

// A share is a range of the keys of all heads.
template <class E>
void add_splits(const BlockSparseAttention& a, int part, int parts) {
  const int64_t all = a.batch * a.kv_heads * a.keys, to = all * (part + 1) / parts;
  for (int64_t key = all * part / parts; key < to;) {
    const int64_t unit = key / a.keys, first = key % a.keys, last = smaller(a.keys, first + to - key);
    store_grads<E>(a, unit, first, last, a.split_grads + unit * a.splits * a.grad_words(), a.splits);
    key += last - first;
  }
}

template <class P>
struct Backward {
  typedef typename P::Element E;
  const BlockSparseAttention& a;
  Heads<P, F32> heads;
  int64_t width, value_width;                      // rounded up, of rows
  float* grads_of_keys;                            // and values, as grad_words() says
  float *queries, *grads, *query_rows, *grad_rows;  // of one tile
  float *out, *context, *probabilities, *grad_scores, *lse, *delta;

  Backward(const BlockSparseAttention& a, float* scratch) : a(a), heads(a, scratch) {
    width = a.padded_width();
    value_width = a.padded_value_width();
    grads_of_keys = heads.rest;
    queries = grads_of_keys + (a.split_grads ? 0 : a.grad_words());
    grads = queries + a.width * a.T;
    query_rows = grads + a.value_width * a.T;
    grad_rows = query_rows + width * a.T;
    out = grad_rows + value_width * a.T;
    context = out + a.width * a.T;
    probabilities = context + a.width * a.T;
    grad_scores = probabilities + a.T * a.T;
    lse = grad_scores + a.T * a.T;
    delta = lse + a.T;
  }

  // rows[T][rounded] floats of x, zero beyond `size` and where there is no row.
  void copy_rows(const E* x, int64_t ld, const int32_t* source, int64_t size, int64_t rounded, float* rows) const {
    for (int t = 0; t < a.T; t++)
      for (int64_t d = 0; d < rounded; d += kLanes) {
        const bool there = source[t] >= 0 && d < size;
        store(rows + t * rounded + d, there ? load_first(x + source[t] * ld + d, smaller(kLanes, size - d)) : Vec{});
      }
  }

  template <int R>
  void attend_lanes(int64_t row, int64_t inside, int t) {
    constexpr int W = R * kLanes, B = kKeyBlock;
    const int T = a.T;
    for (int64_t i = 0; i < a.width * W; i += kLanes) store(context + i, Vec{});
    heads.for_tiles(row, inside, [&](int64_t tile, const uint8_t* pattern, const int32_t* real) __attribute__((always_inline)) {
      multiply_keys<F32, R>(
          queries + t, heads.key_tile(tile), T, a.width, [&](int j, int r, Vec sum) __attribute__((always_inline)) {
            Vec p = probability(sum * (a.scale * kLog2e) - load(lse + t + r * kLanes));
            if (pattern) p = attends(pattern + j * a.rows + t + r * kLanes) ? p : Vec{};
            if (real && real[j] < 0) p = Vec{};
            store(probabilities + j * W + r * kLanes, p);
          });
      multiply_keys<F32, R>(
          grads + t, heads.value_tile(tile), T, a.value_width, [&](int j, int r, Vec sum) __attribute__((always_inline)) {
            const Vec p = load(probabilities + j * W + r * kLanes), change = sum - load(delta + t + r * kLanes);
            store(grad_scores + j * W + r * kLanes, p == Vec{} ? Vec{} : p * change * a.scale);
          });
      const float* keys = heads.key_tile(tile);
      int64_t d = 0;
      for (; d + B <= a.width; d += B) add_values<F32, R, B>(grad_scores, keys + d * T, T, context + d * W);
      for (; d < a.width; d++) add_values<F32, R, 1>(grad_scores, keys + d * T, T, context + d * W);
      float* sums = grads_of_keys + tile * a.tile_words();
      int32_t* used = (int32_t*)(grads_of_keys + a.key_tiles() * a.tile_words()) + tile;
      if (!*used) memset(sums, 0, a.tile_words() * sizeof(float));
      *used = 1;
      add_tile<W>(grad_scores, query_rows + t * width, T, width, sums);
      add_tile<W>(probabilities, grad_rows + t * value_width, T, value_width, sums + T * width);
    });
    for (int64_t d = 0; d < a.width; d++)
      for (int r = 0; r < R; r++) store(out + d * T + t + r * kLanes, load(context + d * W + r * kLanes));
  }

  void attend_tile(int64_t batch, int64_t head, int64_t block_row, int64_t inside) {
    int32_t source[32];
    const int64_t first = block_row * a.rows + inside, used = rows_of_tile(a, first, source);
    const E *query = head_of<E>(a.query, batch, head), *grad = head_of<E>(a.grad, batch, head);
    pack_rows<P>(query, a.query.strides[2], source, a.width, a.T, queries);
    pack_rows<P>(grad, a.grad.strides[2], source, a.value_width, a.T, grads);
    copy_rows(query, a.query.strides[2], source, a.width, width, query_rows);
    copy_rows(grad, a.grad.strides[2], source, a.value_width, value_width, grad_rows);
    const int64_t rows = (batch * a.heads + head) * a.queries;
    for (int t = 0; t < a.T; t++) {
      const bool there = t < used && a.lse[rows + first + t] != kMasked;
      lse[t] = there ? a.lse[rows + first + t] * kLog2e : 0;
      delta[t] = there ? a.delta[rows + first + t] : 0;
    }
    const int64_t row = a.mask_row(head, block_row);
    for (int t = 0; t < used; t += 2 * kLanes)
      used - t > kLanes ? attend_lanes<2>(row, inside, t) : attend_lanes<1>(row, inside, t);
    unpack_rows(out, source, a.width, a.T, (E*)a.grad_query + rows * a.width, a.width);
  }

  // The queries of one split, which are those of all heads that share the keys.
  void attend_split(int64_t batch, int64_t kv_head, int64_t split) {
    const int64_t group = a.heads / a.kv_heads, unit = batch * a.kv_heads + kv_head;
    const int64_t total = cost_of_head(a, kv_head), from = total * split / a.splits, to = total * (split + 1) / a.splits;
    heads.select(batch, kv_head);
    if (a.split_grads) grads_of_keys = a.split_grads + (unit * a.splits + split) * a.grad_words();
    memset(grads_of_keys + a.key_tiles() * a.tile_words(), 0, a.key_tiles() * sizeof(int32_t));
    int64_t at = 0;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t block_row = 0; block_row < a.block_rows(); block_row++) {
        if (from <= at && at < to)
          for (int64_t inside = 0; inside < smaller(a.rows, a.queries - block_row * a.rows); inside += a.T)
            attend_tile(batch, head, block_row, inside);
        at += cost_of_row(a, head, block_row);
      }
    if (!a.split_grads) store_grads<E>(a, unit, 0, a.keys, grads_of_keys, 1);
  }
};

// A share is whole splits: those that begin in its range of costs.
template <class P>
void block_sparse_attention_backward(const BlockSparseAttention& a, int part, int parts, float* scratch) {
  if (a.adding) return add_splits<typename P::Element>(a, part, parts);
  Backward<P> backward(a, scratch);
  auto units = [&](auto visit) {
    int64_t at = 0;
    for (int64_t batch = 0; batch < a.batch; batch++)
      for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
        for (int64_t split = 0; split < a.splits; split++) {
          visit(at, batch, kv_head, split);
          at += 1 + cost_of_head(a, kv_head) / a.splits;
        }
    return at;
  };
  const int64_t total = units([](auto...) {}), from = total * part / parts, to = total * (part + 1) / parts;
  units([&](int64_t at, auto... split) {
    if (from <= at && at < to) backward.attend_split(split...);
  });
}

}  // namespace

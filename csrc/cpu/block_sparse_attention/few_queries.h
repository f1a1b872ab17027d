// Forward for few queries, as in decoding with a cache of keys: each gathers the keys that it attends to and reads their
// rows as they lie, so that nothing is packed for lanes that would stay empty. Lanes run over features.
#pragma once

#include "heads.h"

namespace {

template <class E>
struct FewQueries {
  const BlockSparseAttention& a;
  float *query, *scores;
  int32_t* keys;  // that one query attends to
  int64_t count = 0;

  FewQueries(const BlockSparseAttention& a, float* scratch) : a(a), query(scratch) {
    scores = query + (a.width + 15) / 16 * 16;
    keys = (int32_t*)(scores + (a.keys + 15) / 16 * 16);
    memset(query, 0, (a.width + 15) / 16 * 16 * sizeof(float));
  }

  void gather(int64_t batch, int64_t head, int64_t i) {
    const uint8_t* real = a.key_mask ? a.key_mask + batch * a.keys : nullptr;
    const int64_t row = a.mask_row(head, i / a.rows);
    count = 0;
    for (int32_t p = a.crow_indices[row]; p < a.crow_indices[row + 1]; p++) {
      const int64_t from = a.col_indices[p] * a.columns, to = smaller(from + a.columns, a.keys), index = a.pattern_indices[p];
      const uint8_t* pattern = index < 0 ? nullptr : a.patterns + index * a.columns * a.rows + i % a.rows;
      for (int64_t key = from; key < to; key++) {
        keys[count] = (int32_t)key;
        count += (!pattern || pattern[(key - from) * a.rows]) && (!real || real[key]);
      }
    }
    for (int64_t p = count; count && p % kLanes; p++) keys[p] = keys[count - 1];
  }

  // Of all gathered keys, in units of ln 2; -inf up to the next multiple of kLanes. Returns the largest.
  template <bool Whole>
  float score(const E* rows, int64_t ld) const {
    Vec most = splat(kLowest);
    for (int64_t p = 0; p < count; p += kLanes) {
      Vec r[kLanes];
      SNLP_UNROLL for (int i = 0; i < kLanes; i++) {
        const E* key = rows + keys[p + i] * ld;
        r[i] = Vec{};
        for (int64_t d = 0; d < a.width; d += kLanes)
          r[i] += load(query + d) * (Whole ? load(key + d) : load_first(key + d, smaller(kLanes, a.width - d)));
      }
      transpose(r);
      SNLP_UNROLL for (int step = kLanes / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) r[i] += r[i + step];
      store(scores + p, r[0]);
      for (int64_t i = count; i < p + kLanes; i++) scores[i] = kMasked;
      most = max(most, load(scores + p));
    }
    float largest = most[0];
    for (int i = 1; i < kLanes; i++) largest = most[i] > largest ? most[i] : largest;
    return largest;
  }

  // y[N vectors] = sum over the gathered keys of their probabilities times their values.
  template <bool Whole, int N>
  void mix(const E* rows, int64_t ld, int64_t left, float factor, E* y) const {
    constexpr int U = 8 / N;  // independent sums, to cover the latency
    Vec sum[U][N] = {};
    auto add = [&](int u, int64_t p) __attribute__((always_inline)) {
      const Vec weight = splat(scores[p]);
      const E* at = rows + keys[p] * ld;
      SNLP_UNROLL for (int n = 0; n < N; n++)
        sum[u][n] += weight * (Whole ? load(at + n * kLanes) : load_first(at + n * kLanes, smaller(kLanes, left - n * kLanes)));
    };
    int64_t p = 0;
    for (; p + U <= count; p += U)
      SNLP_UNROLL for (int u = 0; u < U; u++) add(u, p + u);
    for (; p < count; p++) add(0, p);
    SNLP_UNROLL for (int n = 0; n < N; n++) {
      SNLP_UNROLL for (int u = 1; u < U; u++) sum[0][n] += sum[u][n];
      store_first(y + n * kLanes, sum[0][n] * factor, smaller(kLanes, left - n * kLanes));
    }
  }

  template <bool Whole>
  void attend(const E* q, const E* key, int64_t key_ld, const E* value, int64_t value_ld, E* y, float* lse) const {
    for (int64_t d = 0; d < a.width; d += kLanes)
      store(query + d, load_first(q + d, smaller(kLanes, a.width - d)) * (a.scale * kLog2e));
    const float largest = score<Whole>(key, key_ld);
    Vec totals = {};
    for (int64_t p = 0; p < count; p += kLanes) {
      const Vec weight = probability(load(scores + p) - largest);
      store(scores + p, weight);
      totals += weight;
    }
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += totals[i];
    *lse = largest / kLog2e + __builtin_logf(total);
    int64_t d = 0;
    for (; a.value_width - d > kLanes; d += 2 * kLanes)
      mix<Whole, 2>(value + d, value_ld, a.value_width - d, 1 / total, y + d);
    if (d < a.value_width) mix<Whole, 1>(value + d, value_ld, a.value_width - d, 1 / total, y + d);
  }
};

// A share is a range of queries, of all sequences and heads; those of a head follow each other, and find its keys in cache.
template <class E>
void few_queries(const BlockSparseAttention& a, int part, int parts, float* scratch) {
  FewQueries<E> few(a, scratch);
  const bool whole = a.width % kLanes == 0 && a.value_width % (2 * kLanes) == 0;
  const int64_t group = a.heads / a.kv_heads, units = a.batch * a.queries * a.heads;
  int64_t gathered = -1;  // of which sequence and query
  for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
    const int64_t i = unit % a.queries, head = unit / a.queries % a.heads, batch = unit / a.queries / a.heads;
    if (a.mask_heads > 1 || batch * a.queries + i != gathered) few.gather(batch, head, i);
    gathered = batch * a.queries + i;
    const int64_t row = (batch * a.heads + head) * a.queries + i;
    E* y = (E*)a.y + row * a.value_width;
    if (few.count == 0) {
      memset(y, 0, a.value_width * sizeof(E));
      a.lse[row] = kMasked;
      continue;
    }
    const E* query = head_of<E>(a.query, batch, head) + i * a.query.strides[2];
    const E *key = head_of<E>(a.key, batch, head / group), *value = head_of<E>(a.value, batch, head / group);
    const int64_t key_ld = a.key.strides[2], value_ld = a.value.strides[2];
    if (whole)
      few.template attend<true>(query, key, key_ld, value, value_ld, y, a.lse + row);
    else
      few.template attend<false>(query, key, key_ld, value, value_ld, y, a.lse + row);
  }
}

}  // namespace

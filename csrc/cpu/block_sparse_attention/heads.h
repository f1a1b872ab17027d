// The keys and values of one head of one sequence as feature-major tiles, each packed when a query first meets it.
#pragma once

#include "../encoder_layer/attention.h"
#include "block_sparse_attention.h"

namespace {

template <class E>
SNLP_INLINE const E* head_of(const AttentionRows& rows, int64_t batch, int64_t head) {
  return (const E*)rows.x + batch * rows.strides[0] + head * rows.strides[1];
}

enum TileState : int32_t { kUnpacked, kNoKey, kSomeKeys, kAllKeys };

// P: how elements of a row become words, A: how those are multiplied.
template <class P, class A>
struct Heads {
  typedef typename P::Element E;
  typedef typename A::Element V;
  const BlockSparseAttention& a;
  int64_t words, batch = -1, kv_head = -1;
  float *keys, *values;     // [tiles][words or value width][T]
  int32_t *source, *state;  // row of each key, -1 where there is none; of each tile
  float* rest;              // scratch that is left

  Heads(const BlockSparseAttention& a, float* scratch) : a(a), words((a.width + A::kUnit - 1) / A::kUnit) {
    const int64_t padded = a.key_tiles() * a.T;
    keys = scratch;
    values = keys + padded * a.width;
    source = (int32_t*)(values + padded * a.value_width);
    state = source + padded;
    rest = (float*)(state + padded);
  }

  void select(int64_t new_batch, int64_t new_head) {
    if (batch == new_batch && kv_head == new_head) return;
    batch = new_batch;
    kv_head = new_head;
    memset(state, 0, a.key_tiles() * sizeof *state);
  }

  // visit(tile, pattern, real) for each tile of keys to which some query of the tile at row `inside` of a block row of the
  // mask attends. pattern: the queries that attend to each key, a.rows apart; real: the keys, negative for padding; each
  // is null if it leaves nothing out.
  template <class Visit>
  inline __attribute__((always_inline)) void for_tiles(int64_t row, int64_t inside, Visit visit) {
    const int T = a.T;
    for (int32_t p = a.crow_indices[row]; p < a.crow_indices[row + 1]; p++) {
      const int64_t from = a.col_indices[p] * a.columns / T, to = smaller(from + a.columns / T, a.key_tiles());
      const int64_t index = a.pattern_indices[p], first = index * a.columns / T;
      for (int64_t tile = from; tile < to; tile++) {
        const TilePattern pairs = index < 0 ? kAllPairs : a.tiles[(first + tile - from) * (a.rows / T) + inside / T];
        if (pairs == kNoPair) continue;
        if (state[tile] == kUnpacked) pack(tile);
        if (state[tile] == kNoKey) continue;
        visit(
            tile, pairs == kAllPairs ? nullptr : a.patterns + (first + tile - from) * T * a.rows + inside,
            state[tile] == kAllKeys ? nullptr : source + tile * T);
      }
    }
  }

  const float* key_tile(int64_t tile) const { return keys + tile * words * a.T; }
  const V* value_tile(int64_t tile) const { return (const V*)(values + tile * a.value_width * a.T); }

 private:
  void pack(int64_t tile) {
    const int64_t first = tile * a.T;
    const uint8_t* real = a.key_mask ? a.key_mask + batch * a.keys : nullptr;
    int count = 0;
    for (int64_t key = first; key < first + a.T; key++) {
      const bool there = key < a.keys && (!real || real[key]);
      source[key] = there ? (int32_t)key : -1;
      count += there;
    }
    state[tile] = count == 0 ? kNoKey : count < a.T ? kSomeKeys : kAllKeys;
    if (count == 0) return;
    pack_rows<P>(
        head_of<E>(a.key, batch, kv_head), a.key.strides[2], source + first, a.width, a.T, keys + tile * words * a.T);
    pack_rows<typename P::Scalar>(
        head_of<E>(a.value, batch, kv_head), a.value.strides[2], source + first, a.value_width, a.T, (V*)value_tile(tile));
  }
};

// The rows of a tile of queries: -1 beyond the last.
SNLP_INLINE int64_t rows_of_tile(const BlockSparseAttention& a, int64_t first, int32_t source[32]) {
  for (int t = 0; t < a.T; t++) source[t] = first + t < a.queries ? (int32_t)(first + t) : -1;
  return smaller(a.T, a.queries - first);
}

// Whether kLanes queries attend to a key: a column of a pattern.
SNLP_INLINE VecI attends(const uint8_t* pattern) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)pattern)) != 0;
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)pattern)) != 0;
#else
  return __builtin_convertvector((load_lanes<uint8_t, kLanes>(pattern)), VecI) != 0;
#endif
}

}  // namespace

// Attention to the keys in the stored blocks of a mask, forward and backward.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Elements of one head of one sequence lie at x + batch * strides[0] + head * strides[1] + row * strides[2].
struct AttentionRows {
  const void* x;
  int64_t strides[3];
};

constexpr int64_t kMostSplits = 16;

// Which pairs of a tile of queries and one of keys attend.
enum TilePattern : uint8_t { kNoPair, kSomePairs, kAllPairs };

struct BlockSparseAttention {
  AttentionRows query, key, value;
  void* y;     // batch x heads x queries x value_width
  float* lse;  // batch x heads x queries: log-sum-exp of the scaled scores
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  float scale;
  bool half;  // query, key, value and y are bfloat16

  // The mask: block rows of its heads one after the other, and what the blocks hold.
  const int32_t *crow_indices, *col_indices, *pattern_indices;
  const uint8_t* patterns;  // P x block columns x block rows, 1 where a query attends to a key, else 0
  const TilePattern* tiles;  // P x tiles of keys x tiles of queries of a block
  int64_t mask_heads, rows, columns;  // rows, columns: of a block, multiples of T
  const uint8_t* key_mask;  // batch x keys, 0 for padding, or null
  int T;                    // 16 or 32: queries and keys in a tile

  // Backward: what forward returned as lse, and the gradients.
  AttentionRows grad;  // of y
  const float* delta;  // batch x heads x queries
  void *grad_query, *grad_key, *grad_value;  // contiguous
  int64_t splits;      // of the queries of a head of keys, which add up gradients of their own: 1 to kMostSplits
  float* split_grads;  // batch x kv_heads x splits x grad_words(), 64-byte aligned, or null for one split
  bool adding;         // the second call of a kernel, which adds up split_grads: in parts of any number

  int64_t block_rows() const { return (queries + rows - 1) / rows; }
  int64_t key_tiles() const { return (keys + T - 1) / T; }
  int64_t mask_row(int64_t head, int64_t row) const { return (mask_heads > 1 ? head : 0) * block_rows() + row; }

  int64_t padded_width() const { return (width + 15) / 16 * 16; }
  int64_t padded_value_width() const { return (value_width + 15) / 16 * 16; }
  // Of the gradients of all keys and values of a head: a tile's keys in rows, then its values, and for each tile whether
  // anything was added to it, without which it holds nothing.
  int64_t tile_words() const { return T * (padded_width() + padded_value_width()); }
  int64_t grad_words() const { return key_tiles() * tile_words() + (key_tiles() + 15) / 16 * 16; }
  // Whether queries are too few to share tiles of keys.
  bool few_queries() const { return queries <= 8; }

  // 4-byte words of scratch that one part needs. For few queries: one of them, and the scores and indices of its keys.
  // Else the keys and values of a head, with the row of each and the state of
  // each tile; then, forward: a tile of queries, its context twice, and the scores of 128 keys; backward: rows of the
  // gradients of keys and values; a tile of queries and its gradients, feature-major and in rows, and its scores twice.
  size_t scratch() const {
    if (adding) return 0;
    const int64_t padded = key_tiles() * T, all = width + value_width;
    if (!grad_query) return few_queries() ? padded_width() + 2 * padded : padded * (all + 2) + T * (all + value_width + 128);
    const int64_t rounded = padded_width() + padded_value_width();
    return padded * (all + 2) + (split_grads ? 0 : grad_words()) + T * (all + rounded + 2 * width + 2 * T + 2);
  }
};

// The `tiles` of `count` patterns.
static inline void find_tiles(const BlockSparseAttention& a, int64_t count, TilePattern* tiles) {
  for (int64_t column = 0; column < count * a.columns; column += a.T)
    for (int64_t row = 0; row < a.rows; row += a.T) {
      int attending = 0;
      for (int64_t j = column; j < column + a.T; j++)
        for (int64_t i = row; i < row + a.T; i++) attending += a.patterns[j * a.rows + i];
      *tiles++ = attending == 0 ? kNoPair : attending < a.T * a.T ? kSomePairs : kAllPairs;
    }
}

// The kernel computes share `part` of `parts`, of about equal work. `scratch` is private to the call and 64-byte
// aligned.
typedef void BlockSparseAttentionKernel(const BlockSparseAttention&, int part, int parts, float* scratch);

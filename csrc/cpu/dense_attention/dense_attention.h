// Multi-head attention within sequences, from rows of queries, keys and values to rows of context.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct DenseAttention {
  const void *query, *key, *value;     // rows of heads * width elements
  int64_t query_ld, key_ld, value_ld;  // elements from row to row
  void* y;                             // rows of heads * value_width elements
  int64_t query_width, value_width;    // elements of a head: of query and key, of value
  // Lanes, in tiles of T: the real tokens of each sequence, which begins a tile.
  const int32_t* source;     // row of each token, -1 for a lane without one
  const int32_t* positions;  // of each token in its sequence
  const int64_t* tiles;      // sequences + 1: the first tile of each sequence
  const int64_t* lengths;    // sequences: the tokens of each
  int64_t sequences, longest;  // longest: tiles of the longest sequence
  const float* position_bias;  // heads x side x side, or null
  int64_t side;
  float scale;
  int T;  // 16 or 32
  int heads;
  bool half;  // query, key, value and y are bfloat16

  // Rows of queries and keys in a tile: kernels may take them in pairs.
  int64_t query_rows() const { return (query_width + 1) / 2 * 2; }

  // 4-byte words of scratch that one part needs: a head's queries, keys and values in a sequence; and for a tile the scores
  // of 128 keys, and the context twice.
  size_t scratch() const {
    return (size_t)T * (longest * (2 * query_rows() + value_width) + 128 + 2 * value_width);
  }
};

// The kernel computes share `part` of `parts`, of about equal work. `scratch` is private to the call and 64-byte
// aligned.
typedef void DenseAttentionKernel(const DenseAttention&, int part, int parts, float* scratch);

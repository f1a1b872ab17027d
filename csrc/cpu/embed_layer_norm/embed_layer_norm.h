// y = LayerNorm(word[id] + token_type[...] + position[...]) * weight + bias, for M tokens in sequences of S.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct EmbedLayerNorm {
  const int64_t* ids;             // M; all indices are inside of their tables
  const int64_t* position_ids;    // position_count, M or S, repeated; or null: 0, 1, ... in each sequence
  const int64_t* token_type_ids;  // token_type_count, M or S, repeated; or null: 0
  const void* word;               // rows of H
  const void* position;           // rows of H, or null
  const void* token_type;         // rows of H, or null
  const void* weight;             // H
  const void* bias;               // H, or null
  void* y;                        // M x H
  int64_t M, S, H, position_count, token_type_count;
  float eps;

  // 4-byte words of scratch that one part needs: a row in whole vectors.
  size_t scratch() const { return (size_t)(H + 15) / 16 * 16; }
};

// The kernel computes share `part` of `parts`, a range of tokens. `scratch` is private to the call and 64-byte
// aligned.
typedef void EmbedLayerNormKernel(const EmbedLayerNorm&, int part, int parts, float* scratch);

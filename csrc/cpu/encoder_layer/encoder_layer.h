// A transformer encoder layer with block-sparse projections, on tokens in feature-major tiles.
#pragma once

#include <stddef.h>
#include <stdint.h>

// y = x Wᵀ + b for a block-sparse W (BSR).
struct Projection {
  const int32_t* crow;   // N / n + 1
  const int32_t* col;    // block column of each block
  const void* values;    // blocks of n x k, row-major
  const float* scales;   // N: int8 weights times this are the weights; else null
  const float* bias;     // N
  int32_t* row_sums;     // N, filled by kEncoderSums: what int8 dot products start from
  int64_t N, K;
  int n, k;
};

// Where the tokens of a stream come from and what they attend to, each `tiles * T`.
struct Spans {
  const int32_t* source;  // row of x, -1 for a lane without a token; those are at the end
  const int32_t* first;   // keys of a token: packed tokens [first, last), which need not be among them
  const int32_t* last;
};

// Places in a table of one head's position bias are counted in 32 bits.
constexpr int64_t kMostPositions = 46340;

// What attention reads: heads, and the queries, keys and values of tokens in tiles of T.
struct AttentionTiles {
  const int32_t* positions;    // of each token in its sequence; read with position_bias
  const int64_t* query_rows;   // heads + 1: head h owns rows [query_rows[h], query_rows[h + 1]) of queries and keys
  const int64_t* value_rows;   // heads + 1: the same of values
  const float* position_bias;  // heads x side x side, or null: added to the scores of (query, key) by their positions
  int64_t side;                // at most kMostPositions
  int T;  // 16 or 32
  int heads;
  float scale;
  float *queries, *keys, *values;  // of each tile, feature-major; 4-byte words
  uint8_t* strange;  // of each tile: whether a value may not be finite; null where a tile holds one sequence
};

// The phases of a layer, each to be over for all parts before the next begins.
enum EncoderPhase : int { kEncoderSums, kEncoderProject, kEncoderRest, kEncoderPhases };

struct EncoderLayer : AttentionTiles {
  const float* x;  // tiles x H x T
  float* y;        // tiles x H x T
  Spans spans;
  Projection query, key, value, output, fc1, fc2;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;  // H each
  int64_t tiles, tokens;  // in use
  int64_t H;
  float eps;
  int activation;  // enum Activation
  bool pre_norm;
  bool half, half_attention;  // inputs of projections, and of attention, may be bfloat16 where that is fast

  int64_t widest() const {
    const int64_t inner = fc1.N > value.N ? fc1.N : value.N;
    return inner > H ? inner : H;
  }

  // 4-byte words of scratch that one part needs: rows of norm, residual, context and hidden, words, the scales of
  // tokens, and for attention the scores of 128 keys and the context of a head; each rounded up.
  size_t scratch() const { return (size_t)T * (2 * H + 2 * value.N + fc1.N + widest() + 16 + 2 + 128) + 8 * 16; }
};

// Computes share `part` of `parts` of a phase; `scratch` is private to the call and 64-byte aligned.
typedef void EncoderLayerKernel(const EncoderLayer&, int phase, int part, int parts, float* scratch);

// Between rows of features and a stream.
struct EncoderRows {
  const void* x;  // rows x H, to pack
  void* y;        // rows x H, unpacked
  float* stream;  // tiles x H x T
  const int32_t* source;
  int64_t tiles, H;
  int T;
  bool half;  // x and y are bfloat16, not float

  size_t scratch() const { return 64; }
};
typedef void EncoderRowsKernel(const EncoderRows&, int part, int parts, float* scratch);

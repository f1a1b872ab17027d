// y = fc2(act(fc1(x))) with block-sparse weights.
#pragma once

#include "../encoder_layer/encoder_layer.h"

// The phases, each to be over for all parts before the next begins.
enum SparseFfnPhase : int { kFfnSums, kFfnTiles };

struct SparseFfn {
  const void* x;  // M x fc1.K
  void* y;        // M x fc2.N
  Projection fc1, fc2;
  int64_t M;
  int T;           // tokens of a tile, 16 or 32
  int activation;  // enum Activation
  bool half;       // x and y are bfloat16, and hidden features may be

  int64_t widest() const {
    const int64_t outer = fc1.K > fc2.N ? fc1.K : fc2.N;
    return outer > fc1.N ? outer : fc1.N;
  }

  // 4-byte words of scratch that one part needs: rows of x and y, of hidden features, words, and the scales of tokens.
  size_t scratch() const { return (size_t)T * (2 * widest() + fc1.N + 16 + 2); }
};

// Computes share `part` of `parts` of a phase; `scratch` is private to the call and 64-byte aligned.
typedef void SparseFfnKernel(const SparseFfn&, int phase, int part, int parts, float* scratch);

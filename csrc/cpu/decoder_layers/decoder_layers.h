// Pre-norm transformer decoder layers with sparse projections and a cache of keys and values, for the next
// `length` tokens of each of `batch` sequences:
//
//   x = x + output(attention(qkv(norm1(x))))      y = norm(x) after the last layer
//   x = x + down(act(gate(norm2(x))) * up(norm2(x)))
//
// Activations and cache are of one Element, float or bfloat16; the residual stream is float.
#pragma once

#include "../bsr_linear/bsr_linear.h"

enum { kSilu = 16 };  // beside enum Activation: bsr_linear does not fuse it

struct DecoderNorm {
  const void* weight;  // H
  const void* bias;    // H for LayerNorm, null for RMSNorm
};

struct DecoderLinear {
  BsrLinear args;
  BsrLinearKernel* run;  // for the dtype of the weights; null where the layer has no such projection
};

struct DecoderLayer {
  DecoderNorm norm1, norm2;
  DecoderLinear inputs[3];  // query, key and value, or one for all of them
  DecoderLinear output, gate, up, down;
  int64_t inner;  // rows of gate and up
};

struct DecoderLayers {
  const DecoderLayer* layers;
  DecoderNorm norm;
  const void* x;             // M x H, M = batch * length
  void* y;                   // M x H
  void* cache;               // 2 x layer_count x batch x kv_heads x capacity x head_dim
  const float* rope;         // per position head_dim / 2 cosines, then as many sines; null: no rotation
  const int64_t* positions;  // M, rows of `rope`
  const float* mask;         // batch x (past + length), added to the scores; or null
  float* stream;             // M x H
  void* normed;              // M x H
  void* qkv[3];              // query, key and value of token m start at m * qkv_stride
  int64_t qkv_stride[3];
  void* attended;   // M x heads * head_dim
  void* projected;  // M x H: of output and of down
  void* gate;       // M x inner of the layer
  void* up;
  int64_t batch, length, past, capacity, H;
  int layer_count, heads, kv_heads, head_dim;
  int activation;
  float scale, eps;

  int64_t tokens() const { return batch * length; }
  size_t scratch() const { return (size_t)(past + length + head_dim + 64); }  // without that of the projections
};

// Every part finishes a phase before one begins the next.
enum DecoderPhase : int {
  kNormInput,
  kProjectInputs,
  kAppend,
  kAttend,
  kProjectOutput,
  kNormInner,
  kProjectInner,
  kActivate,
  kProjectDown,
  kDecoderPhases
};

inline int decoder_phases(const DecoderLayers& a) { return a.layer_count * kDecoderPhases + 1; }

// Share `part` of `parts` of one phase; the shares are disjoint in what they write.
typedef void DecoderLayersKernel(const DecoderLayers&, int phase, int part, int parts, float* scratch);

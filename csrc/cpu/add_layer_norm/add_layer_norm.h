// y = LayerNorm(x + residual) * weight + bias, over the last dimension.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct AddLayerNorm {
  const void* x;         // M x H
  const void* residual;  // M x H, or null
  const void* weight;    // H
  const void* bias;      // H, or null
  void* y;               // M x H
  int64_t M, H;
  float eps;

  // 4-byte words of scratch that one part needs: a row in whole vectors.
  size_t scratch() const { return (size_t)(H + 15) / 16 * 16; }
};

// The kernel computes share `part` of `parts`, a range of rows. `scratch` is private to the call and 64-byte
// aligned.
typedef void AddLayerNormKernel(const AddLayerNorm&, int part, int parts, float* scratch);

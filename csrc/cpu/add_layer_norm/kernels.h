// The kernel for any instruction set, see avx512.cpp and its siblings.
#pragma once

#include "../layer_norm.h"
#include "add_layer_norm.h"

namespace {

template <class E>
void forward(const AddLayerNorm& a, int part, int parts, float* row) {
  for (int64_t m = a.M * part / parts; m < a.M * (part + 1) / parts; m++) {
    const E* from[] = {(const E*)a.x + m * a.H, (const E*)a.residual + m * a.H};
    const float sum = a.residual ? add_rows<2>(from, a.H, row) : add_rows<1>(from, a.H, row);
    normalize(row, sum, a.H, (const E*)a.weight, (const E*)a.bias, a.eps, (E*)a.y + m * a.H);
  }
}

}  // namespace

#define SNLP_FORWARD(name, element)                                                             \
  void add_layer_norm_##name(const AddLayerNorm& a, int part, int parts, float* scratch) { \
    forward<element>(a, part, parts, scratch);                                                  \
  }

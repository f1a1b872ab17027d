// The kernel for any instruction set, see avx512.cpp and its siblings.
#pragma once

#include "../layer_norm.h"
#include "embed_layer_norm.h"

namespace {

template <class E>
void forward(const EmbedLayerNorm& a, int part, int parts, float* row) {
  const int64_t end = a.M * (part + 1) / parts;
  for (int64_t m = a.M * part / parts; m < end; m++) {
    const E* from[3] = {(const E*)a.word + a.ids[m] * a.H};
    int count = 1;
    if (a.token_type) {
      const int64_t id = a.token_type_ids ? a.token_type_ids[m % a.token_type_count] : 0;
      from[count++] = (const E*)a.token_type + id * a.H;
    }
    if (a.position) {
      const int64_t id = a.position_ids ? a.position_ids[m % a.position_count] : m % a.S;
      from[count++] = (const E*)a.position + id * a.H;
    }
    if (m + 1 < end) {  // the next row of a table that is far larger than any cache
      const char* next = (const char*)((const E*)a.word + a.ids[m + 1] * a.H);
      for (int64_t byte = 0; byte < a.H * (int64_t)sizeof(E); byte += 64) __builtin_prefetch(next + byte);
    }
    const float sum = count == 3   ? add_rows<3>(from, a.H, row)
                      : count == 2 ? add_rows<2>(from, a.H, row)
                                   : add_rows<1>(from, a.H, row);
    normalize(row, sum, a.H, (const E*)a.weight, (const E*)a.bias, a.eps, (E*)a.y + m * a.H);
  }
}

}  // namespace

#define SNLP_FORWARD(name, element)                                                                \
  void embed_layer_norm_##name(const EmbedLayerNorm& a, int part, int parts, float* scratch) { \
    forward<element>(a, part, parts, scratch);                                                     \
  }

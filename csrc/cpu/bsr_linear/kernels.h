// The entries: which micro-kernel serves which block shape. Compiled once per instruction set, see
// avx512.cpp and its siblings.
#pragma once

#include "few_tokens.h"
#include "grad.h"
#include "pairs.h"
#include "many_tokens.h"
#include "packed_rows.h"

namespace {

template <class D, int BN, int R, int N1>
SNLP_INLINE void blocks(const BsrLinear& a, int part, int parts, float* scratch) {
  if (a.k == D::kUnit) return many_tokens<D, Blocks<BN, N1, true>, R>(a, part, parts, scratch);
  many_tokens<D, Blocks<BN, N1, false>, R>(a, part, parts, scratch);
}

// BN x R sums: 16 of 32 registers, 12 of 16.
template <class D>
SNLP_INLINE void many_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  constexpr bool kMany = kRegisters == 32;
  constexpr int BN = kMany ? 8 : 4, R = kMany ? 2 : 3, R4 = kMany ? 4 : 3;
  if (a.n == 8) return blocks<D, BN, R, 8>(a, part, parts, scratch);
  if (a.n == 16) return blocks<D, BN, R, 16>(a, part, parts, scratch);
  if (a.n == 4) return blocks<D, 4, R4, 4>(a, part, parts, scratch);
  if (a.n % 8 == 0) return blocks<D, BN, R, 0>(a, part, parts, scratch);
  if (a.n % 4 == 0) return blocks<D, 4, R4, 0>(a, part, parts, scratch);
  if (a.n % 2 == 0) return blocks<D, 2, 4, 0>(a, part, parts, scratch);
  blocks<D, 1, 4, 0>(a, part, parts, scratch);
}

template <class D>
void forward(const BsrLinear& a, int part, int parts, float* scratch) {
  if (!few_tokens<D>(a, part, parts, scratch)) many_tokens<D>(a, part, parts, scratch);
}

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
void forward_bf16_dot(const BsrLinear& a, int part, int parts, float* scratch) {
  if (a.k % 2 == 0) return forward<Bf16Dot>(a, part, parts, scratch);
#if defined(__AVX512BF16__)
  if (a.k == 1) {
    if (few_tokens<Bf16Wide>(a, part, parts, scratch)) return;
    if (a.n % 8 == 0) return many_tokens<Bf16Dot, PairedColumns<8>, 2>(a, part, parts, scratch);
    if (a.n % 4 == 0) return many_tokens<Bf16Dot, PairedColumns<4>, 4>(a, part, parts, scratch);
    if (a.n % 2 == 0) return many_tokens<Bf16Dot, PairedColumns<2>, 4>(a, part, parts, scratch);
    return many_tokens<Bf16Dot, PairedColumns<1>, 4>(a, part, parts, scratch);
  }
#endif
  forward<Bf16Wide>(a, part, parts, scratch);
}
#endif

// x of float or of bfloat16.
template <template <class> class I8>
void forward_i8(const BsrLinear& a, int part, int parts, float* scratch) {
  if (a.half) return forward<I8<bf16>>(a, part, parts, scratch);
  forward<I8<float>>(a, part, parts, scratch);
}

}  // namespace

#define SNLP_FORWARD(name, function) \
  void bsr_linear_##name(const BsrLinear& a, int part, int parts, float* scratch) { function(a, part, parts, scratch); }

// The dtype with an x of floats, and with one of bfloat16.
#define SNLP_PACKED(name, D, Half)                                                                         \
  size_t bsr_linear_pack_##name(const BsrLinear& a, const int32_t* rows, int64_t count, float* packed) {   \
    return pack_rows<D>(a, rows, count, packed);                                                           \
  }                                                                                                        \
  void bsr_linear_packed_##name(const BsrLinear& a, const float* packed, float* scratch) {                 \
    a.half ? packed_rows<Half>(a, packed, scratch) : packed_rows<D>(a, packed, scratch);                   \
  }

#define SNLP_GRAD(name, element)                                                                  \
  void bsr_linear_dgrad_##name(const BsrLinearGrad& a, int part, int parts, float* scratch) {     \
    dgrad<element>(a, part, parts, scratch);                                                      \
  }                                                                                               \
  void bsr_linear_wgrad_##name(const BsrLinearGrad& a, int part, int parts, float* scratch) {     \
    wgrad<element>(a, part, parts, scratch);                                                      \
  }

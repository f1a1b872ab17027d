// The entries: which kernel serves which pattern. Compiled once per instruction set, see avx512.cpp and its
// siblings.
#pragma once

#include "few_tokens.h"
#include "many_tokens.h"

namespace {

template <class D, class P>
void forward_pattern(const NmLinear& a, int part, int parts, float* scratch) {
  if (a.decode()) return few_tokens<D, P>(a, part, parts, scratch);
  many_tokens<Singles<D, P>, 8>(a, part, parts, scratch);
}

template <class D>
void forward(const NmLinear& a, int part, int parts, float* scratch) {
  if (a.m == 8) return forward_pattern<D, Pattern<4, 8>>(a, part, parts, scratch);
  if (a.n == 1) return forward_pattern<D, Pattern<1, 4>>(a, part, parts, scratch);
  forward_pattern<D, Pattern<2, 4>>(a, part, parts, scratch);
}

#if defined(__AVX512BF16__)
template <class P>
void forward_bf16_dot(const NmLinear& a, int part, int parts, float* scratch) {
  if (a.decode()) return few_tokens<Bf16Dot, P>(a, part, parts, scratch);
  many_tokens<Singles<Bf16Wide, P>, 8>(a, part, parts, scratch);
}

void forward_bf16_dot(const NmLinear& a, int part, int parts, float* scratch) {
  if (a.m == 8) return forward_bf16_dot<Pattern<4, 8>>(a, part, parts, scratch);
  if (a.n == 1) return forward_bf16_dot<Pattern<1, 4>>(a, part, parts, scratch);
  if (a.decode()) return few_tokens<Bf16Dot, Pattern<2, 4>>(a, part, parts, scratch);
  many_tokens<Pairs, 4>(a, part, parts, scratch);
}
#endif

}  // namespace

#define SNLP_FORWARD(name, function) \
  void nm_linear_##name(const NmLinear& a, int part, int parts, float* scratch) { function(a, part, parts, scratch); }

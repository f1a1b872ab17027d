// A projection, its activation, and the words that the next projection reads: the hidden features of a tile stay in the
// second-level cache.
#pragma once

#include "project.h"

namespace {

// act(p(x)) as `next` reads it, in `to` or the scratch.
template <class D, int R, int Act>
Words project_and_activate(const Projection& p, const Words& x, int T, const Projection& next, float* to, const WordsScratch& w) {
  constexpr bool rough = Act == kGelu && (D::kUnit > 1 || D::kQuantized);
  const auto act = [](Vec v) __attribute__((always_inline)) { return rough ? rough_gelu(v) : activate<Act>(v); };
#if defined(__AVX512BF16__)
  if (takes_singles<D>(next)) {
    project_to_singles<D, R>(p, x, T, to, act);
    return {to, nullptr};
  }
#endif
  if constexpr (D::kUnit == 2 && !D::kQuantized) {
    project_to_pairs<D, R>(p, x, T, to, act);
    return {to, nullptr};
  } else {
    project_to_rows<D, R>(p, x, T, to, [&](Vec v, int64_t, int) __attribute__((always_inline)) { return act(v); });
    return words_for<D>(next, to, T, w);
  }
}

template <class D, int R>
Words project_and_activate(
    const Projection& p, const Words& x, int T, int activation, const Projection& next, float* to, const WordsScratch& w) {
  switch (activation) {
    case kRelu: return project_and_activate<D, R, kRelu>(p, x, T, next, to, w);
    case kGelu: return project_and_activate<D, R, kGelu>(p, x, T, next, to, w);
    case kGeluTanh: return project_and_activate<D, R, kGeluTanh>(p, x, T, next, to, w);
    default: return project_and_activate<D, R, kNone>(p, x, T, next, to, w);
  }
}

}  // namespace

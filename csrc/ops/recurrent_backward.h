// The order of the steps of the backward pass of sparse_lstm and sparse_gru over threads.
#pragma once

#include "recurrent.h"

#define GRAD(isa, dtype, suffix) BsrLinearGradKernel bsr_linear_dgrad_##dtype##_##suffix;
#include "../cpu/bsr_linear/bsr_linear.inc"

namespace recurrent {

inline BsrLinearGradKernel* dgrad_kernel(Dtype dtype) {
#define GRAD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_dgrad_##type##_##suffix},
  const Listed<BsrLinearGradKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

// out = a + b + c, M rows of P; those of a are `stride` apart, and b and c may be null.
template <class E>
void add_rows(const E* a, int64_t stride, const E* b, const float* c, int64_t M, int64_t P, E* out) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t j = 0; j < P; j++) {
      const int64_t at = m * P + j;
      write(out[at], read(a[m * stride + j]) + (b ? read(b[at]) : 0) + (c ? c[at] : 0));
    }
}

inline void add_rows(
    Dtype dtype, const void* a, int64_t stride, const void* b, const float* c, int64_t M, int64_t P, void* out) {
  if (dtype == f32)
    add_rows(static_cast<const float*>(a), stride, static_cast<const float*>(b), c, M, P, static_cast<float*>(out));
  else
    add_rows(static_cast<const uint16_t*>(a), stride, static_cast<const uint16_t*>(b), c, M, P,
             static_cast<uint16_t*>(out));
}

// Some sequences at one step of the backward pass.
struct BackwardStep {
  int64_t d, sequence, M;  // M sequences from `sequence` on
  int64_t token;           // of the first of them
  int64_t token_before;    // the same at the step before, which `known` of them have; the others began here
  int64_t known;
};

// The backward pass. A part takes its sequences through all steps: it never waits for another.
struct Backward {
  const Steps& steps;
  const std::vector<BsrLinearGrad>&recurrent, &projection;
  Dtype dtype;
  int64_t directions;
  bool reverse;

  // step(BackwardStep, memory for M x `hidden` elements, dgrad) for all of them, the last step first.
  template <class Step>
  void run(int64_t hidden, const Step& step) const {
    constexpr int64_t kSequences = 16;  // that bsr_linear_dgrad takes together
    const int64_t tiles = (steps.batch + kSequences - 1) / kSequences;
    const BsrLinearGrad& first = recurrent[0];
    const int64_t weights = int64_t{first.crow[first.N / first.n]} * first.n * first.k;
    const int64_t work = directions * steps.tokens * (weights + first.N);
    const int64_t parts = std::min(tiles, parts_of(directions, work));
    size_t words = 0;
    for (const std::vector<BsrLinearGrad>* list : {&recurrent, &projection})
      for (const BsrLinearGrad& a : *list) words = std::max(words, (a.scratch() + 15) / 16 * 16);
    BsrLinearGradKernel* kernel = dgrad_kernel(dtype);
    over_directions(directions, parts, work, [&](int64_t d, int64_t begin, int64_t end) {
      const int64_t low = tiles * begin / parts * kSequences;
      const int64_t high = std::min(tiles * end / parts * kSequences, steps.batch);
      static thread_local Scratch memory;
      float* scratch = memory.at_least(words + (high - low) * hidden);
      const auto dgrad = [&](BsrLinearGrad a, int64_t M, const void* grad, void* dx) {
        a.M = M;
        a.grad = grad;
        a.dx = dx;
        kernel(a, 0, 1, scratch);
      };
      const bool backwards = reverse != (d == 1);
      for (int64_t index = steps.count(); index-- > 0;) {
        const int64_t now = steps.at(index, backwards), before = index ? steps.at(index - 1, backwards) : now;
        BackwardStep at{d, low};
        at.M = std::min(steps.size[now], high) - low;
        at.token = steps.start[now] + low;
        at.token_before = steps.start[before] + low;
        if (at.M <= 0) continue;
        if (index) at.known = std::max<int64_t>(0, std::min(at.M, steps.size[before] - low));
        step(at, reinterpret_cast<char*>(scratch + words), dgrad);
      }
    });
  }
};

}  // namespace recurrent

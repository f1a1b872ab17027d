#include "../vec.h"
#include "limits.h"

namespace {

SNLP_INLINE int64_t fma_peak(int64_t rounds) {
  constexpr int kSums = kRegisters == 32 ? 16 : 12;  // more than latency times units, and all in registers
  Vec sum[kSums];
  for (int i = 0; i < kSums; i++) sum[i] = splat((float)i);
  Vec a = splat(1e-9f), b = splat(0.5f);
  for (int64_t round = 0; round < rounds; round++) {
    SNLP_UNROLL for (int i = 0; i < kSums; i++) sum[i] += a * b;
    SNLP_UNROLL for (int i = 0; i < kSums; i++) {
#if defined(__x86_64__)
      asm volatile("" : "+v"(sum[i]));
#else
      asm volatile("" : "+w"(sum[i]));
#endif
    }
#if defined(__x86_64__)
    asm volatile("" : "+v"(a), "+v"(b));
#else
    asm volatile("" : "+w"(a), "+w"(b));
#endif
  }
  return rounds * kSums * kLanes * 2;
}

}  // namespace

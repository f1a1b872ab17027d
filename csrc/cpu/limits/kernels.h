#include "../vec.h"
#include "limits.h"

namespace {

#if defined(__x86_64__)
SNLP_INLINE void keep(Vec& v) { asm volatile("" : "+v"(v)); }
#else
SNLP_INLINE void keep(Vec& v) { asm volatile("" : "+w"(v)); }
#endif

SNLP_INLINE int64_t fma_peak(int64_t rounds) {
  constexpr int kSums = kRegisters == 32 ? 16 : 12;  // more than latency times units, and all in registers
  Vec sum[kSums];
  SNLP_UNROLL for (int i = 0; i < kSums; i++) sum[i] = splat((float)i);  // all different, so none is shared
  Vec a = splat(1e-9f), b = splat(0.5f);
  for (int64_t round = 0; round < rounds; round++) {
    keep(a);  // unknown to the compiler from round to round
    keep(b);
    SNLP_UNROLL for (int i = 0; i < kSums; i++) sum[i] = sum[i] * a + b;
  }
  Vec all = sum[0];
  SNLP_UNROLL for (int i = 1; i < kSums; i++) all += sum[i];
  keep(all);
  return rounds * kSums * kLanes * 2;
}

}  // namespace

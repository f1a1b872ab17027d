// The loops over all indices of a call, compiled for the vectors of whatever machine runs them.
#include "checks.h"

#if defined(__x86_64__) && defined(__GLIBC__)
#define SNLP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SNLP_CLONES
#endif

SNLP_CLONES uint32_t largest_index(const int32_t* index, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t now = static_cast<uint32_t>(index[i]);
    largest = now > largest ? now : largest;
  }
  return largest;
}

// Differences of numbers below 2^31 do not go round, and a fall shows in the sign.
SNLP_CLONES bool never_falls(const int32_t* index, int64_t count) {
  uint32_t signs = count > 0 ? static_cast<uint32_t>(index[0]) : 0;
  for (int64_t i = 1; i < count; i++)
    signs |= static_cast<uint32_t>(index[i]) | (static_cast<uint32_t>(index[i]) - static_cast<uint32_t>(index[i - 1]));
  return signs >> 31 == 0;
}

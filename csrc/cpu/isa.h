// Which instruction sets there are, which this machine runs, and the one in use.
#pragma once

// Worst to best within one architecture.
enum Isa : int { kScalar, kNeon, kAvx2, kAvx512, kIsaCount };

inline const char* isa_name(int isa) {
  static const char* const names[] = {"scalar", "neon", "avx2", "avx512"};
  return names[isa];
}

// CPU and operating system both run it (the vector state is saved on a context switch).
inline bool isa_supported(int isa) {
  switch (isa) {
    case kScalar: return true;
#if defined(__aarch64__)
    case kNeon: return true;
#endif
#if defined(__x86_64__)
    case kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    default: return false;
  }
}

// The best instruction set no better than the cap. The cap starts at the best and is per process.
int isa_in_use();
void set_isa_cap(int isa);

// Which instruction sets there are, which this machine runs, and the one in use.
#pragma once

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

// Worst to best within one architecture. Each has all that the ones before it have, where it exists:
// dot is the int8 dot product (SDOT), vnni is VPDPBUSD, bf16 is the bfloat16 dot product as well.
enum Isa : int {
  kScalar,
  kNeon,
  kNeonDot,
  kNeonBf16,
  kAvx2,
  kAvx2Vnni,
  kAvx512,
  kAvx512Vnni,
  kAvx512Bf16,
  kIsaCount
};

inline const char* isa_name(int isa) {
  static const char* const names[] = {"scalar",    "neon",   "neon_dot",    "neon_bf16",  "avx2",
                                      "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"};
  return names[isa];
}

// CPU and operating system both run it (the vector state is saved on a context switch).
inline bool isa_supported(int isa) {
  switch (isa) {
    case kScalar: return true;
#if defined(__aarch64__)
    case kNeon: return true;
    case kNeonDot: return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
    case kNeonBf16: return isa_supported(kNeonDot) && (getauxval(AT_HWCAP2) >> 14 & 1);  // HWCAP2_BF16
#endif
#if defined(__x86_64__)
    case kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx2Vnni: return isa_supported(kAvx2) && __builtin_cpu_supports("avxvnni");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case kAvx512Vnni: return isa_supported(kAvx512) && __builtin_cpu_supports("avx512vnni");
    case kAvx512Bf16: return isa_supported(kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
#endif
    default: return false;
  }
}

// The best instruction set no better than the cap. The cap starts at the best and is per process.
int isa_in_use();
void set_isa_cap(int isa);

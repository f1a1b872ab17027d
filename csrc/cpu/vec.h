// The vector type of the instruction set this file is compiled for, on GCC/Clang vector extensions:
// +, *, < and splats are plain operators, and the compiler emits FMA with broadcast operands.
// Everything lives in an anonymous namespace: a weak symbol compiled for AVX-512 would otherwise be
// linked into everybody's path.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SNLP_INLINE static inline __attribute__((always_inline))
#define SNLP_UNROLL _Pragma("GCC unroll 16")

namespace {

template <int L>
struct VecOf {
  typedef float type __attribute__((vector_size(L * sizeof(float))));
  typedef float loose __attribute__((vector_size(L * sizeof(float)), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(L * sizeof(int32_t))));
};

// Lanes of the widest vector, and how many vector registers there are.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

template <int L>
using VecL = typename VecOf<L>::type;
using Vec = VecL<kLanes>;
using VecI = typename VecOf<kLanes>::ints;

template <int L = kLanes>
SNLP_INLINE VecL<L> load(const float* p) {
  return *(const typename VecOf<L>::loose*)p;
}

template <int L = kLanes>
SNLP_INLINE void store(float* p, VecL<L> v) {
  *(typename VecOf<L>::loose*)p = v;
}

template <int L = kLanes>
SNLP_INLINE VecL<L> splat(float value) {
  return VecL<L>{} + value;
}

template <int L>
SNLP_INLINE void store_first(float* p, VecL<L> v, int64_t count) {
  if (count >= L) return store<L>(p, v);
  float lanes[L];
  store<L>(lanes, v);
  memcpy(p, lanes, count * sizeof(float));
}

// Transpose kLanes vectors of kLanes floats in place.
#if defined(__AVX512F__)
SNLP_INLINE void transpose(Vec r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = (Vec)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 1] = (Vec)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 2] = (Vec)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    r[i + 3] = (Vec)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; i++) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#elif defined(__AVX2__)
SNLP_INLINE void transpose(Vec r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  __m256 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#elif defined(__x86_64__)
SNLP_INLINE void transpose(Vec r[4]) {
  _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
}
#else
SNLP_INLINE void transpose(Vec r[kLanes]) {
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < kLanes; j++) t[j][i] = r[i][j];
  for (int i = 0; i < kLanes; i++) r[i] = load(t[i]);
}
#endif

}  // namespace

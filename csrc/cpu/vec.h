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

// L lanes of T, as a value and as it may lie in memory.
template <class T, int L>
struct Lanes {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
  typedef T loose __attribute__((vector_size(L * sizeof(T)), aligned(1), may_alias));
};

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
  uint16_t bits;
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
using VecL = typename Lanes<float, L>::type;
template <int L>
using IntsL = typename Lanes<int32_t, L>::type;
template <int L>
using WordsL = typename Lanes<uint32_t, L>::type;
using Vec = VecL<kLanes>;
using VecI = IntsL<kLanes>;

template <class T, int L>
SNLP_INLINE typename Lanes<T, L>::type load_lanes(const T* p) {
  return *(const typename Lanes<T, L>::loose*)p;
}

template <class T, int L>
SNLP_INLINE void store_lanes(T* p, typename Lanes<T, L>::type v) {
  *(typename Lanes<T, L>::loose*)p = v;
}

template <int L = kLanes>
SNLP_INLINE VecL<L> load(const float* p) {
  return load_lanes<float, L>(p);
}

template <int L = kLanes>
SNLP_INLINE void store(float* p, VecL<L> v) {
  store_lanes<float, L>(p, v);
}

// The 4 bytes at p in every lane.
template <int L = kLanes>
SNLP_INLINE VecL<L> splat_word(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return (VecL<L>)(IntsL<L>{} + word);
}

template <int L = kLanes>
SNLP_INLINE VecL<L> splat(float value) {
  return splat_word<L>(&value);
}

template <int L = kLanes>
SNLP_INLINE VecL<L> load(const bf16* p) {
  const auto bits = load_lanes<uint16_t, L>(&p->bits);
  return (VecL<L>)(__builtin_convertvector(bits, WordsL<L>) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
template <int L = kLanes>
SNLP_INLINE void store(bf16* p, VecL<L> v) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16) return _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
  const WordsL<L> bits = (WordsL<L>)v;
  const WordsL<L> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const WordsL<L> kept = v == v ? rounded : bits >> 16 | 0x40;
  typedef typename Lanes<uint16_t, L>::type Halves;
  store_lanes<uint16_t, L>(&p->bits, __builtin_convertvector(kept, Halves));
}

template <int L = kLanes>
SNLP_INLINE VecL<L> splat(bf16 value) {
  return (VecL<L>)(WordsL<L>{} + ((uint32_t)value.bits << 16));
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SNLP_INLINE float to_float(float value) { return value; }
SNLP_INLINE float to_float(bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// The first `count` lanes, from and to memory that ends there.
template <int L = kLanes, class T>
SNLP_INLINE VecL<L> load_first(const T* p, int64_t count) {
  if (count >= L) return load<L>(p);
  T lanes[L] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load<L>(lanes);
}

template <int L = kLanes, class T>
SNLP_INLINE void store_first(T* p, VecL<L> v, int64_t count) {
  if (count >= L) return store<L>(p, v);
  T lanes[L];
  store<L>(lanes, v);
  memcpy(p, lanes, count * sizeof(T));
}

// v[i] + v[i ^ H] in lane i.
template <int L, int H, class V>
SNLP_INLINE V add_across(V v) {
  if constexpr (H < L) {
    IntsL<L> from;
    for (int i = 0; i < L; i++) from[i] = i ^ H;
    return v + __builtin_shuffle(v, from);
  }
  return v;
}

// The sum over each `segment` of lanes, in the first of them.
template <int L, class V>
SNLP_INLINE V add_segments(V v, int segment) {
  if (segment > 8) v = add_across<L, 8>(v);
  if (segment > 4) v = add_across<L, 4>(v);
  if (segment > 2) v = add_across<L, 2>(v);
  return segment > 1 ? add_across<L, 1>(v) : v;
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

// What differs between the dtypes. A kernel thinks in 32-bit words: a word of x and a word of weights hold
// kUnit values each, and dot() adds their products, lane by lane. A dtype says how x becomes words, how
// weights are read as words, and what a sum means as a float. Scalar is the dtype with the same numbers and
// one value in a word.
//
//   F32       1 float                                    FMA
//   Bf16Wide  1 bfloat16, widened to float               FMA
//   Bf16Dot   2 bfloat16                                 VDPBF16PS, BFDOT
//   I8Wide    1 int8, widened to int32                   any instruction set
//   I8Madd    2 int8, widened to int16                   VPMADDWD
//   I8Dot     4 int8                                     VPDPBUSD (x shifted by 128 to unsigned), SDOT
#pragma once

#include "vec_math.h"

namespace {

// From an x of floats or bfloat16, all but int8.
template <class E>
struct FloatSums {
  typedef E Element;
  typedef float Word;
  template <int L>
  using Sum = VecL<L>;
  static constexpr bool kQuantized = false;
  static constexpr int kShift = 0;
  template <int L>
  SNLP_INLINE VecL<L> value(VecL<L> sum) { return sum; }
  SNLP_INLINE float word(E weight) { return to_float(weight); }
};

// One value in a word, widened to float.
template <class E>
struct Wide : FloatSums<E> {
  typedef E Weight;
  typedef Wide Scalar;
  static constexpr int kUnit = 1;
  template <int L>
  SNLP_INLINE VecL<L> words(const E* x, float) { return load<L>(x); }
  template <int L>
  SNLP_INLINE VecL<L> weights(const E* w) { return load<L>(w); }
  template <int L>
  SNLP_INLINE VecL<L> splat_weight(const E* w) { return splat<L>(*w); }
  template <int L>
  SNLP_INLINE VecL<L> dot(VecL<L> sum, VecL<L> x, VecL<L> w) { return sum + x * w; }
};
typedef Wide<float> F32;
typedef Wide<bf16> Bf16Wide;

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct Bf16Dot : FloatSums<bf16> {
  typedef bf16 Weight;
  typedef Bf16Wide Scalar;
  static constexpr int kUnit = 2;
  template <int L>
  SNLP_INLINE VecL<L> words(const bf16* x, float) { return load<L>((const float*)x); }
  template <int L>
  SNLP_INLINE VecL<L> weights(const bf16* w) { return load<L>((const float*)w); }
  template <int L>
  SNLP_INLINE VecL<L> splat_weight(const bf16* w) { return splat_word<L>(w); }
  template <int L>
  SNLP_INLINE VecL<L> dot(VecL<L> sum, VecL<L> x, VecL<L> w) {
#if defined(__AVX512BF16__)
    if constexpr (L == 16) return (VecL<L>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    if constexpr (L == 8) return (VecL<L>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)w);
    if constexpr (L == 4) return (VecL<L>)_mm_dpbf16_ps((__m128)sum, (__m128bh)x, (__m128bh)w);
#else
    if constexpr (L == 4) return (VecL<L>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w);
#endif
  }
};
#endif

// int8 weights; x is rounded to int8 as it is read, times `inverse` = 1 / scale.
template <class E>
struct IntSums {
  typedef E Element;
  typedef int32_t Word;
  typedef int8_t Weight;
  template <int L>
  using Sum = IntsL<L>;
  static constexpr bool kQuantized = true;
  template <int L>
  SNLP_INLINE VecL<L> value(IntsL<L> sum) { return __builtin_convertvector(sum, VecL<L>); }
  // round(v) + shift, to the nearest, ties to even, within +-127. NaN gives some number in range.
  template <int L>
  SNLP_INLINE IntsL<L> to_int(VecL<L> v, float shift) {
    const VecL<L> limit = splat<L>(127.0f);
    const VecL<L> low = v > -limit ? v : -limit, clamped = low < limit ? low : limit;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    return (IntsL<L>)(clamped + (magic + shift)) - 0x4b400000;
  }
  template <int L>
  SNLP_INLINE IntsL<L> rounded(const E* x, float inverse, float shift) {
    return to_int<L>(load<L>(x) * inverse, shift);
  }
};

template <class E>
struct I8Wide : IntSums<E> {
  typedef I8Wide Scalar;
  SNLP_INLINE int32_t word(int8_t weight) { return weight; }
  static constexpr int kUnit = 1, kShift = 0;
  template <int L>
  SNLP_INLINE VecL<L> words(const E* x, float inverse) {
    return (VecL<L>)IntSums<E>::template rounded<L>(x, inverse, 0);
  }
  template <int L>
  SNLP_INLINE VecL<L> weights(const int8_t* w) {
    const auto bytes = load_lanes<int8_t, L>(w);
    return (VecL<L>)__builtin_convertvector(bytes, IntsL<L>);
  }
  template <int L>
  SNLP_INLINE VecL<L> splat_weight(const int8_t* w) { return (VecL<L>)(IntsL<L>{} + (int32_t)*w); }
  template <int L>
  SNLP_INLINE IntsL<L> dot(IntsL<L> sum, VecL<L> x, VecL<L> w) { return sum + (IntsL<L>)x * (IntsL<L>)w; }
};

#if defined(__AVX2__)
template <class E>
struct I8Madd : IntSums<E> {
  typedef I8Wide<E> Scalar;
  static constexpr int kUnit = 2, kShift = 0;
  template <int L>
  SNLP_INLINE VecL<L> words(const E* x, float inverse) {
    typedef typename Lanes<int16_t, L>::type Half;
    int16_t pairs[2 * L];
    for (int half = 0; half < 2; half++) {
      const IntsL<L> q = IntSums<E>::template rounded<L>(x + half * L, inverse, 0);
      store_lanes<int16_t, L>(pairs + half * L, __builtin_convertvector(q, Half));
    }
    return load<L>((const float*)pairs);
  }
  template <int L>
  SNLP_INLINE VecL<L> weights(const int8_t* w) {
    typedef typename Lanes<int16_t, 2 * L>::type Shorts;
    const auto bytes = load_lanes<int8_t, 2 * L>(w);
    return (VecL<L>)__builtin_convertvector(bytes, Shorts);
  }
  template <int L>
  SNLP_INLINE VecL<L> splat_weight(const int8_t* w) {
    return (VecL<L>)(IntsL<L>{} + (int32_t)((uint16_t)(int16_t)w[0] | (uint32_t)(int32_t)w[1] << 16));
  }
  template <int L>
  SNLP_INLINE IntsL<L> dot(IntsL<L> sum, VecL<L> x, VecL<L> w) {
#if defined(__AVX512BW__)
    if constexpr (L == 16) return sum + (IntsL<L>)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#endif
    if constexpr (L == 8) return sum + (IntsL<L>)_mm256_madd_epi16((__m256i)x, (__m256i)w);
    if constexpr (L == 4) return sum + (IntsL<L>)_mm_madd_epi16((__m128i)x, (__m128i)w);
  }
};
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
template <class E>
struct I8Dot : IntSums<E> {
  typedef I8Wide<E> Scalar;
#if defined(__x86_64__)
  static constexpr int kUnit = 4, kShift = 128;
#else
  static constexpr int kUnit = 4, kShift = 0;
#endif
  template <int L>
  SNLP_INLINE VecL<L> words(const E* x, float inverse) {
    typedef typename Lanes<int8_t, L>::type Quarter;
    int8_t quads[4 * L];
    for (int quarter = 0; quarter < 4; quarter++) {
      const IntsL<L> q = IntSums<E>::template rounded<L>(x + quarter * L, inverse, kShift);
      store_lanes<int8_t, L>(quads + quarter * L, __builtin_convertvector(q, Quarter));
    }
    return load<L>((const float*)quads);
  }
  template <int L>
  SNLP_INLINE VecL<L> weights(const int8_t* w) { return load<L>((const float*)w); }
  template <int L>
  SNLP_INLINE VecL<L> splat_weight(const int8_t* w) { return splat_word<L>(w); }
  template <int L>
  SNLP_INLINE IntsL<L> dot(IntsL<L> sum, VecL<L> x, VecL<L> w) {
#if defined(__AVX512VNNI__)
    if constexpr (L == 16) return (IntsL<L>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
    if constexpr (L == 8) return (IntsL<L>)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
    if constexpr (L == 4) return (IntsL<L>)_mm_dpbusd_epi32((__m128i)sum, (__m128i)x, (__m128i)w);
#elif defined(__AVXVNNI__)
    if constexpr (L == 8) return (IntsL<L>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
    if constexpr (L == 4) return (IntsL<L>)_mm_dpbusd_avx_epi32((__m128i)sum, (__m128i)x, (__m128i)w);
#else
    if constexpr (L == 4) return (IntsL<L>)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
#endif
  }
};
#endif

}  // namespace

// Which inputs the next kept values of a row meet, lanes running over the values: positions come from the
// packed codes by shifts, and the inputs at them from a table of x in registers by permutes. Gathers and
// expanding loads are many times slower.
#pragma once

#include "../tile.h"
#include "nm_linear.h"

namespace {

// n of every m inputs are kept; m is a power of two, and m / n is 2 or 4.
template <int n, int m>
struct Pattern {
  static constexpr int kKept = n, kGroup = m, kRatio = m / n, kBits = m <= 4 ? 2 : 4;
};

// Of each lane: how far its code is shifted within a word of lane_bits, and where its group begins.
template <class P, class T, int L>
struct LaneTable {
  T shift[L] = {}, base[L] = {};
  constexpr LaneTable() {
    for (int i = 0; i < L; i++) {
      shift[i] = T(i * P::kBits % (8 * sizeof(T)));
      base[i] = T(i / P::kKept * P::kGroup);
    }
  }
};

constexpr int32_t kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The positions of the next kLanes values within the next kLanes * m / n inputs.
template <class P>
SNLP_INLINE VecI positions32(const uint8_t* codes) {
  static constexpr LaneTable<P, uint32_t, kLanes> table{};
  typedef WordsL<kLanes> Words;
  uint64_t bits = 0;
  memcpy(&bits, codes, kLanes * P::kBits / 8);
  Words word = Words{} + (uint32_t)bits;
  if constexpr (kLanes * P::kBits > 32)
    word = load_lanes<int32_t, kLanes>(kIota) >= 32 / P::kBits ? Words{} + (uint32_t)(bits >> 32) : word;
  const Words shift = load_lanes<uint32_t, kLanes>(table.shift), base = load_lanes<uint32_t, kLanes>(table.base);
  return (VecI)((word >> shift & (P::kGroup - 1)) | base);
}

#if defined(__AVX512F__)
// A permute takes from two vectors; each of kRatio / 2 such pairs serves an equal share of the lanes.
template <class P>
SNLP_INLINE Vec pick32(const float* x, VecI at) {
  Vec picked = (Vec)_mm512_permutex2var_ps(load(x), (__m512i)at, load(x + 16));
  if constexpr (P::kRatio == 4)
    picked = (Vec)_mm512_mask_blend_ps(
        0xff00, picked, _mm512_permutex2var_ps(load(x + 32), (__m512i)at, load(x + 48)));
  return picked;
}
#elif defined(__AVX2__)
// Each of kRatio vectors serves an equal share of the lanes.
template <class P>
SNLP_INLINE Vec pick32(const float* x, VecI at) {
  Vec picked = (Vec)_mm256_permutevar8x32_ps(load(x), (__m256i)at);
  SNLP_UNROLL for (int i = 1; i < P::kRatio; i++)
    picked = load_lanes<int32_t, 8>(kIota) >= i * 8 / P::kRatio
                 ? (Vec)_mm256_permutevar8x32_ps(load(x + i * 8), (__m256i)at) : picked;
  return picked;
}
#else
template <class P>
SNLP_INLINE Vec pick32(const float* x, VecI at) {
  Vec picked;
  for (int i = 0; i < kLanes; i++) picked[i] = x[at[i]];
  return picked;
}
#endif

// kLanes words of weights, zero beyond `count` of them.
template <class D>
SNLP_INLINE Vec first_weights(const typename D::Weight* w, int64_t count) {
  if (count >= kLanes * D::kUnit) return D::template weights<kLanes>(w);
  typename D::Weight padded[kLanes * D::kUnit] = {};
  memcpy(padded, w, count * sizeof *w);
  return D::template weights<kLanes>(padded);
}

#if defined(__AVX512BF16__)
// The same for 32 values of 16 bits.
template <class P>
SNLP_INLINE __m512i positions16(const uint8_t* codes) {
  static constexpr LaneTable<P, uint16_t, 32> table{};
  // Lane i finds its code in 16-bit word i * kBits / 16 of the codes, which every 128 bits hold.
  struct Spread {
    uint8_t byte[64] = {};
    constexpr Spread() {
      for (int i = 0; i < 64; i++) byte[i] = uint8_t(i / 2 * P::kBits / 16 * 2 + i % 2);
    }
  };
  static constexpr Spread spread{};
  const __m128i bits = P::kBits == 2 ? _mm_loadu_si64(codes) : _mm_loadu_si128((const __m128i*)codes);
  const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bits), _mm512_loadu_si512(spread.byte));
  const __m512i shifted = _mm512_srlv_epi16(words, _mm512_loadu_si512(table.shift));
  const __m512i within = _mm512_and_si512(shifted, _mm512_set1_epi16(P::kGroup - 1));
  return _mm512_or_si512(within, _mm512_loadu_si512(table.base));
}

template <class P>
SNLP_INLINE Vec pick16(const float* x, __m512i at) {
  auto vector = [&](int i) { return (__m512i)load(x + i * 16); };
  __m512i picked = _mm512_permutex2var_epi16(vector(0), at, vector(1));
  if constexpr (P::kRatio == 4)
    picked = _mm512_mask_blend_epi16(0xffff0000, picked, _mm512_permutex2var_epi16(vector(2), at, vector(3)));
  return (Vec)picked;
}
#endif

// For kLanes words of weights of D.
template <class D, class P>
SNLP_INLINE auto positions(const uint8_t* codes) {
#if defined(__AVX512BF16__)
  if constexpr (D::kUnit == 2) return positions16<P>(codes);
#endif
  if constexpr (D::kUnit == 1) return positions32<P>(codes);
}

template <class D, class P, class Positions>
SNLP_INLINE Vec pick(const float* x, Positions at) {
#if defined(__AVX512BF16__)
  if constexpr (D::kUnit == 2) return pick16<P>(x, at);
#endif
  if constexpr (D::kUnit == 1) return pick32<P>(x, at);
}

}  // namespace

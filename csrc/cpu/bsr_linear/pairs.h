// bfloat16 blocks of one input (n x 1), whose inputs come in no order: a dot product of two bfloat16 takes
// them two blocks at a time. The tile holds each input on its own, 16 bits a token; the rows of two inputs
// are interleaved when they are used, and so are the weights of the two blocks.
#pragma once

#include "many_tokens.h"

#if defined(__AVX512BF16__)

namespace {

// Within each 128 bits of a row of the tile: 4 tokens of the first 16, then 4 of the second, so that
// unpacking two rows leaves the pairs of 16 tokens in order.
template <int BN>
struct PairedColumns {
  template <int R>
  static constexpr int64_t ld = (R + 1) / 2 * 16;

  template <class D, int R>
  static void pack(const BsrLinear& a, Tile& tile) {
    constexpr int H = (R + 1) / 2;  // vectors in a row of the tile
    const bf16* x = (const bf16*)a.x + tile.token0 * a.K;
    for (int64_t k = 0; k < a.K; k += 32)
      for (int h = 0; h < H; h++) {
        Vec r[2][16];
        for (int side = 0; side < 2; side++) {
          for (int i = 0; i < 16; i++) {
            const int64_t t = h * 32 + side * 16 + i;
            r[side][i] = t < tile.tokens ? token_words<Bf16Dot>(x + t * a.K, k / 2, a.K, 1) : Vec{};
          }
          transpose(r[side]);
        }
        for (int i = 0; i < 16 && k + 2 * i < a.K; i++) {
          const __m512i first = (__m512i)r[0][i], second = (__m512i)r[1][i], low = _mm512_set1_epi32(0xffff);
          float* to = tile.words + (k + 2 * i) * H * 16 + h * 16;
          const __m512i even = _mm512_packus_epi32(_mm512_and_si512(first, low), _mm512_and_si512(second, low));
          const __m512i odd = _mm512_packus_epi32(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16));
          store(to, (Vec)even);
          if (k + 2 * i + 1 < a.K) store(to + H * 16, (Vec)odd);
        }
      }
  }

  // words[j] = (a[j], b[j]) for BN weights of two blocks.
  SNLP_INLINE void pair_weights(const bf16* a, const bf16* b, int32_t* words) {
    if constexpr (BN == 8) {
      const __m128i va = _mm_loadu_si128((const __m128i*)a), vb = _mm_loadu_si128((const __m128i*)b);
      _mm_store_si128((__m128i*)words, _mm_unpacklo_epi16(va, vb));
      _mm_store_si128((__m128i*)words + 1, _mm_unpackhi_epi16(va, vb));
    } else if constexpr (BN == 4) {
      _mm_store_si128((__m128i*)words, _mm_unpacklo_epi16(_mm_loadu_si64(a), _mm_loadu_si64(b)));
    } else {
      for (int j = 0; j < BN; j++) words[j] = a[j].bits | (uint32_t)b[j].bits << 16;
    }
  }

  template <int R>
  SNLP_INLINE void rows(
      const float* tile, int64_t ld, const int32_t* col, int64_t count, const bf16* values, int64_t n, float* out) {
    constexpr int H = (R + 1) / 2;
    alignas(64) static const float nothing[H * 16] = {};
    static const bf16 zeros[8] = {};
    Vec sum[BN][R] = {};
    for (int64_t p = 0; p < count; p += 2, values += 2 * n) {
      const bool alone = p + 1 == count;
      const float* xa = tile + (int64_t)col[p] * ld;
      const float* xb = alone ? nothing : tile + (int64_t)col[p + 1] * ld;
      __builtin_prefetch((const char*)values + kPrefetchTile);
      alignas(16) int32_t words[BN < 4 ? 4 : BN];
      pair_weights(values, alone ? zeros : values + n, words);
      Vec xv[2 * H];
      for (int h = 0; h < H; h++) {
        const __m512i a = (__m512i)load(xa + h * 16), b = (__m512i)load(xb + h * 16);
        xv[2 * h] = (Vec)_mm512_unpacklo_epi16(a, b);
        xv[2 * h + 1] = (Vec)_mm512_unpackhi_epi16(a, b);
      }
      SNLP_UNROLL for (int j = 0; j < BN; j++) {
        const Vec weight = splat_word(words + j);
        SNLP_UNROLL for (int r = 0; r < R; r++) sum[j][r] = Bf16Dot::dot<16>(sum[j][r], xv[r], weight);
      }
    }
    for (int j = 0; j < BN; j++)
      for (int r = 0; r < R; r++) store(out + j * R * 16 + r * 16, sum[j][r]);
  }

  template <class D, int R, class W>
  SNLP_INLINE void group(
      const W& a, const float* words, int64_t ld, const int32_t*, int64_t row0, int64_t group, float* out) {
    for (int64_t j = 0; j < group; j += BN) {
      const int64_t block_row = (row0 + j) / a.n, inside = (row0 + j) % a.n;
      const int64_t first = a.crow[block_row], count = a.crow[block_row + 1] - first;
      const bf16* values = (const bf16*)a.values + first * a.n + inside;
      rows<R>(words, ld, a.col + first, count, values, a.n, out + j * R * 16);
    }
  }
};

}  // namespace

#endif

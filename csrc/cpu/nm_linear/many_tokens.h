// Many tokens: lanes run over tokens. A tile of x is transposed to rows of T = R vectors of tokens; each
// kept value (or pair of them) is broadcast and multiplied with the row that its code names. Neighbouring
// outputs want different rows, so every product loads its own: the tile is worked off in pieces that stay
// in the first-level cache, kSumRows outputs at a time, whose sums wait in scratch.
#pragma once

#include "pick.h"

namespace {

constexpr int kStep = 8;                  // values whose codes are read together
constexpr int64_t kPieceBytes = 24 << 10;  // of the tile
constexpr int kRowsAhead = 8;             // whose weights are on their way from memory: rows lie far apart

// One row of the tile per input.
template <class D_, class P_>
struct Singles {
  typedef D_ D;
  typedef P_ P;
  static constexpr int kStepRows = kStep * P::kRatio;  // of the tile, that kStep values choose from

  SNLP_INLINE int row(uint32_t codes, int value) {
    return value / P::kKept * P::kGroup + (codes >> value * P::kBits & (P::kGroup - 1));
  }
  template <int R>
  static void pack(const NmLinear& a, Tile& tile) { pack_x<D, R>(a, tile); }
};

#if defined(__AVX512BF16__)
// 2:4 with a dot product of two bfloat16: each of the 6 pairs of inputs in a group has a row of its own.
struct Pairs {
  typedef Bf16Dot D;
  typedef Pattern<2, 4> P;
  static constexpr int kStepRows = kStep / 2 * 6;

  SNLP_INLINE int row(uint32_t codes, int value) {
    // (first, second) as first + 4 * second; what cannot occur reads the first row
    static constexpr uint8_t pair[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 5, 0};
    return value / 2 * 6 + pair[codes >> value * 2 & 15];
  }

  template <int R>
  static void pack(const NmLinear& a, Tile& tile) {
    constexpr int T = R * 16;
    const bf16* x = (const bf16*)a.x + tile.token0 * a.K;
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t w = 0; w < a.K / 2; w += 16)
      for (int t = 0; t < T; t += 16) {
        Vec r[16];
        for (int i = 0; i < 16; i++)
          r[i] = t + i < tile.tokens ? token_words<Bf16Dot>(x + (t + i) * a.K, w, a.K, 1) : Vec{};
        transpose(r);
        for (int i = 0; i < 16 && w + i < a.K / 2; i += 2) {
          const __m512i x01 = (__m512i)r[i], x23 = (__m512i)r[i + 1];
          const __m512i x0 = _mm512_and_si512(x01, low), x1 = _mm512_srli_epi32(x01, 16);
          const __m512i x2 = _mm512_slli_epi32(x23, 16), x3 = _mm512_andnot_si512(low, x23);
          float* to = tile.words + (w + i) / 2 * 6 * T + t;
          store(to, (Vec)x01);
          store(to + T, (Vec)_mm512_or_si512(x0, x2));
          store(to + 2 * T, (Vec)_mm512_or_si512(x0, x3));
          store(to + 3 * T, (Vec)_mm512_or_si512(x1, x2));
          store(to + 4 * T, (Vec)_mm512_or_si512(x1, x3));
          store(to + 5 * T, (Vec)x23);
        }
      }
  }
};
#endif

// sums[i][T] (+)= `count` values of RB rows times their rows of the tile; a piece starts at whole steps.
template <class S, int RB, int R>
SNLP_INLINE void add_piece(
    const float* tile, const typename S::D::Weight* const values[RB], const uint8_t* const codes[RB], int64_t count,
    bool first, float* sums) {
  typedef typename S::D D;
  constexpr int T = R * kLanes, kCodeBytes = kStep * S::P::kBits / 8;
  Vec sum[RB][R] = {};  // of this piece alone: adding short sums rounds less than one long sum
  uint32_t code[RB] = {};
  auto read_codes = [&](int64_t v) {
    for (int i = 0; i < RB; i++) memcpy(code + i, codes[i] + v / kStep * kCodeBytes, kCodeBytes);
  };
  auto add = [&](int64_t v, int value) {
    SNLP_UNROLL for (int i = 0; i < RB; i++) {
      const float* x = tile + S::row(code[i], value) * T;
      const Vec weight = D::template splat_weight<kLanes>(values[i] + v + value);
      SNLP_UNROLL for (int r = 0; r < R; r++) sum[i][r] = D::template dot<kLanes>(sum[i][r], load(x + r * kLanes), weight);
    }
  };
  int64_t v = 0;
  for (; v + kStep <= count; v += kStep, tile += S::kStepRows * T) {
    read_codes(v);
    SNLP_UNROLL for (int value = 0; value < kStep; value += D::kUnit) add(v, value);
  }
  if (v < count) {
    read_codes(v);
    for (int value = 0; value < count - v; value += D::kUnit) add(v, value);
  }
  for (int i = 0; i < RB; i++)
    for (int r = 0; r < R; r++) {
      float* to = sums + i * T + r * kLanes;
      store(to, first ? sum[i][r] : load(to) + sum[i][r]);
    }
}

// One tile times the rows [begin, end).
template <class S, int R>
void one_tile(const NmLinear& a, Tile& tile, int64_t begin, int64_t end, float* sums) {
  typedef typename S::D D;
  constexpr int T = R * kLanes, RB = R == 8 && kRegisters == 32 ? 2 : 8 / R;
  constexpr int64_t kSteps = kPieceBytes / (S::kStepRows * T * sizeof(float)), kPiece = kSteps * kStep;
  static_assert(kSteps > 0, "a step fits into a piece");
  S::template pack<R>(a, tile);
  const int64_t count = a.row_values(), stride = a.packed_bytes();
  if (count == 0) memset(sums, 0, (a.kSumRows + kGroup) * T * sizeof *sums);
  for (int64_t row0 = begin; row0 < end; row0 += a.kSumRows) {
    const int64_t rows = smaller(a.kSumRows, end - row0);
    for (int64_t v = 0; v < count; v += kPiece)
      for (int64_t j = 0; j < rows; j += RB) {
        const typename D::Weight* values[RB];
        const uint8_t* codes[RB];
        for (int i = 0; i < RB; i++) {
          const int64_t row = smaller(row0 + j + i, a.N - 1);
          values[i] = (const typename D::Weight*)a.values + row * count + v;
          codes[i] = a.packed + row * stride + v * S::P::kBits / 8;
          for (int64_t line = 0; line < kPiece * (int64_t)sizeof(typename D::Weight); line += 64)
            __builtin_prefetch((const char*)(values[i] + kRowsAhead * count) + line);
          __builtin_prefetch(codes[i] + kRowsAhead * stride);
        }
        add_piece<S, RB, R>(
            tile.words + v / kStep * S::kStepRows * T, values, codes, smaller(kPiece, count - v), v == 0, sums + j * T);
      }
    for (int64_t j = 0; j < rows; j += kGroup) epilogue<D, R>(a, tile, sums + j * T, row0 + j, smaller(kGroup, rows - j));
  }
}

// This part's share of (tiles x groups of rows). A ragged last tile runs as narrow as it can.
template <class S, int R>
void many_tokens(const NmLinear& a, int part, int parts, float* scratch) {
  constexpr int T = R * kLanes;
  float* sums = scratch;
  Tile tile{scratch + (a.kSumRows + kGroup) * T, 0, 0, nullptr, nullptr};
  const int64_t tiles = (a.M + T - 1) / T, groups = (a.N + kGroup - 1) / kGroup;
  const int64_t from = tiles * groups * part / parts, to = tiles * groups * (part + 1) / parts;
  for (int64_t i = from / groups; i * groups < to; i++) {
    const int64_t begin = from > i * groups ? (from - i * groups) * kGroup : 0;
    const int64_t end = smaller((to - i * groups) * kGroup, a.N);
    tile.token0 = i * T;
    tile.tokens = smaller(T, a.M - tile.token0);
    if (tile.tokens <= kLanes)
      one_tile<S, 1>(a, tile, begin, end, sums);
    else if (tile.tokens <= 2 * kLanes)
      one_tile<S, 2>(a, tile, begin, end, sums);
    else if (tile.tokens <= 4 * kLanes)
      one_tile<S, 4>(a, tile, begin, end, sums);
    else
      one_tile<S, R>(a, tile, begin, end, sums);
  }
}

}  // namespace

// nm_linear for many tokens: rows of W are the sparse operand of mma.sp, tokens its columns.
//
// A block computes kRows x kTokens outputs. A stage of the pipeline is 128 bytes of each token (64 float16 or 128
// int8 columns), the 64 bytes of values that meet them in each row of W, and 8 or 16 bytes of packed positions.
// cp.async keeps kStages - 1 stages under way. Rows and tokens past the end are read as the last one and not written;
// columns past the end are zeros.
#pragma once

#include "../finish.h"
#include "../ptx.h"

namespace {

constexpr int kXBytes = 128;                    // of one token in a stage
constexpr int kValueBytes = kXBytes / 2;        // of one row of W in a stage
constexpr int kPaddedMetadata = 0x44444444;     // positions 0 and 1 in every group: zeros would be out of order

template <int kWarpRows_, int kWarpTokens_, int kWarpsByRows_, int kWarpsByTokens_, int kStages_>
struct Tile {
  static constexpr int kWarpRows = kWarpRows_, kWarpTokens = kWarpTokens_, kWarpsByRows = kWarpsByRows_;
  static constexpr int kRows = kWarpRows * kWarpsByRows, kTokens = kWarpTokens * kWarpsByTokens_;
  static constexpr int kThreads = 32 * kWarpsByRows * kWarpsByTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kSumPitch = kRows + 4;  // so that the sums of a fragment meet different banks
};
using LargeTile = Tile<64, 64, 2, 2, 3>;
using SmallTile = Tile<16, 32, 4, 1, 4>;

template <class T, class Tile>
struct Stage {
  static constexpr int kPackedBytes = kXBytes / sizeof(T) / 8;
  alignas(128) unsigned char x[Tile::kTokens][kXBytes];
  alignas(128) unsigned char values[Tile::kRows][kValueBytes];
  alignas(128) unsigned char packed[Tile::kRows][kPackedBytes];

  // 16-byte pieces are stored where the eight rows that ldmatrix reads at a time meet different banks.
  __device__ unsigned char* x_piece(int token, int piece) { return x[token] + (piece ^ (token & 7)) * 16; }
  __device__ unsigned char* value_piece(int row, int piece) { return values[row] + (piece ^ (row >> 1 & 3)) * 16; }
};

template <class T, class Tile>
constexpr int shared_bytes() {
  constexpr int stages = Tile::kStages * sizeof(Stage<T, Tile>), sums = Tile::kTokens * Tile::kSumPitch * 4;
  return stages > sums ? stages : sums;
}

// Up to 8 values in a row of memory, of which `count` exist; `aligned` if on 16 bytes.
template <class T>
__device__ __forceinline__ void load8(float (&v)[8], const T* from, int count, bool aligned) {
  alignas(16) T raw[8];
  if (aligned && count >= 8) {
#pragma unroll
    for (int i = 0; i < int(sizeof(raw) / 16); i++)
      reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) raw[i] = i < count ? from[i] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = to_float(raw[i]);
}

template <class T>
__device__ __forceinline__ void store8(T* to, const float (&v)[8], int count, bool aligned) {
  alignas(16) T raw[8];
#pragma unroll
  for (int i = 0; i < 8; i++) raw[i] = from_float<T>(v[i]);
  if (aligned && count >= 8) {
#pragma unroll
    for (int i = 0; i < int(sizeof(raw) / 16); i++)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(raw)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < count) to[i] = raw[i];
  }
}

// The metadata of a 16-bit tile for both of a stage's steps (kSelector 0 and 1), or of an int8 tile for one step.
template <class T, class Tile>
__device__ __forceinline__ uint32_t metadata(const Stage<T, Tile>& stage, int row, int step, int lane, int columns) {
  const int g = lane >> 2, t = lane & 3;
  if constexpr (sizeof(T) == 2) {  // 16 columns of rows g and g + 8
    const uint32_t low = *reinterpret_cast<const uint16_t*>(stage.packed[row + g] + 2 * t);
    const uint32_t high = *reinterpret_cast<const uint16_t*>(stage.packed[row + g + 8] + 2 * t);
    const bool inside = bug(8) ? 16 * t <= columns : 16 * t < columns;
    return inside ? low | high << 16 : kPaddedMetadata;
  } else {  // 32 columns of row g or g + 8
    const unsigned char* from = stage.packed[row + g + 8 * (t & 1)] + 8 * step + 4 * (t >> 1);
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    const int first = 64 * step + 32 * (t >> 1);
    return (bug(8) ? first <= columns : first < columns) ? word : kPaddedMetadata;
  }
}

template <class T, class Out, class Tile>
__device__ __forceinline__ void many_tokens(NM_LINEAR_PARAMETERS(T, Out)) {
  using Mma = ptx::MmaSp<T>;
  using Sum = typename Mma::Sum;
  constexpr int kColumns = kXBytes / sizeof(T);  // of a stage, two steps of mma.sp
  constexpr int kRowTiles = Tile::kWarpRows / 16, kTokenTiles = Tile::kWarpTokens / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  Stage<T, Tile>* stages = reinterpret_cast<Stage<T, Tile>*>(shared);

  const int row_tiles = (N + Tile::kRows - 1) / Tile::kRows;
  const int first_row = blockIdx.x % row_tiles * Tile::kRows, first_token = blockIdx.x / row_tiles * Tile::kTokens;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_row = warp % Tile::kWarpsByRows * Tile::kWarpRows;
  const int warp_token = warp / Tile::kWarpsByRows * Tile::kWarpTokens;
  const int packed_row = (K + 63) / 64 * 8;
  const int64_t x_row = int64_t(K) * sizeof(T), value_row = x_row / 2;

  const auto load = [&](int k) {
    Stage<T, Tile>& stage = stages[k % Tile::kStages];
    const unsigned char* from_x = reinterpret_cast<const unsigned char*>(x) + int64_t(k) * kXBytes;
    const unsigned char* from_values = reinterpret_cast<const unsigned char*>(values) + int64_t(k) * kValueBytes;
    const unsigned char* from_packed = packed + int64_t(k) * stage.kPackedBytes;
    const int64_t x_left = x_row - int64_t(k) * kXBytes, packed_left = packed_row - int64_t(k) * stage.kPackedBytes;
    for (int i = threadIdx.x; i < Tile::kTokens * (kXBytes / 16); i += Tile::kThreads) {
      const int token = i / (kXBytes / 16), piece = i % (kXBytes / 16);
      const int64_t at = min(first_token + token, M - 1);
      const bool inside = piece * 16 < x_left;
      ptx::cp_async<16>(stage.x_piece(token, piece), from_x + at * x_row + piece * 16, inside);
    }
    for (int i = threadIdx.x; i < Tile::kRows * (kValueBytes / 16); i += Tile::kThreads) {
      const int row = i / (kValueBytes / 16), piece = i % (kValueBytes / 16);
      const int64_t at = bug(9) ? first_row + row : min(first_row + row, N - 1);
      const bool inside = piece * 32 < x_left;
      ptx::cp_async<16>(stage.value_piece(row, piece), from_values + at * value_row + piece * 16, inside);
    }
    for (int i = threadIdx.x; i < Tile::kRows * (stage.kPackedBytes / 8); i += Tile::kThreads) {
      const int row = i / (stage.kPackedBytes / 8), piece = i % (stage.kPackedBytes / 8);
      const int64_t at = min(first_row + row, N - 1);
      const bool inside = piece * 8 < packed_left;
      ptx::cp_async<8>(stage.packed[row] + piece * 8, from_packed + at * packed_row + piece * 8, inside);
    }
  };

  Sum sums[kRowTiles][kTokenTiles][4] = {};
  const int stage_count = (K + kColumns - 1) / kColumns;
  const auto prefetch = [&](int k) {
    if (k < stage_count) load(k);
    ptx::cp_async_commit();
  };
  for (int k = 0; k < Tile::kStages - 1; k++) prefetch(k);
  for (int k = 0; k < stage_count; k++) {
    if constexpr (bug(3)) prefetch(k + Tile::kStages - 1);
    if constexpr (!bug(1)) ptx::cp_async_wait<Tile::kStages - 2>();
    if constexpr (!bug(2)) __syncthreads();  // stage k is there for all, and all are done with stage k - 1
    if constexpr (!bug(3)) prefetch(k + Tile::kStages - 1);
    Stage<T, Tile>& stage = stages[k % Tile::kStages];
    const int columns = K - k * kColumns;
    uint32_t e[kRowTiles];
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        const int row = warp_row + 16 * i;
        if (sizeof(T) == 1 || step == 0) e[i] = metadata(stage, row, step, lane, columns);
        ptx::ldmatrix_x4(a[i], stage.value_piece(row + (lane & 15), 2 * step + (lane >> 4)));
        if constexpr (bug(4)) a[i][1] ^= a[i][2], a[i][2] ^= a[i][1], a[i][1] ^= a[i][2];
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; j++) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, stage.x_piece(warp_token + 8 * j + (lane & 7), 4 * step + (lane >> 3)));
#pragma unroll
        for (int i = 0; i < kRowTiles; i++) {
          if (sizeof(T) == 1 || step == 0 || bug(5))
            Mma::template run<0>(sums[i][j], a[i], b, e[i]);
          else
            Mma::template run<sizeof(T) == 2>(sums[i][j], a[i], b, e[i]);
        }
      }
    }
  }

  // The sums cross shared memory, to be written row by row.
  Sum* tile = reinterpret_cast<Sum*>(shared);  // [token][row]
  ptx::cp_async_wait<0>();
  if constexpr (!bug(6)) __syncthreads();  // all are done with the last stage
#pragma unroll
  for (int i = 0; i < kRowTiles; i++)
#pragma unroll
    for (int j = 0; j < kTokenTiles; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int row = warp_row + 16 * i + (lane >> 2) + 8 * (c >> 1);
        const int token = warp_token + 8 * j + 2 * (lane & 3) + (c & 1);
        tile[token * Tile::kSumPitch + row] = sums[i][j][c];
      }
  if constexpr (!bug(7)) __syncthreads();

  const bool aligned = N % 8 == 0;
  for (int i = threadIdx.x; i < Tile::kTokens * (Tile::kRows / 8); i += Tile::kThreads) {
    const int token = i / (Tile::kRows / 8), row = i % (Tile::kRows / 8) * 8;
    const int m = first_token + token, n = first_row + row, count = N - n;
    if ((bug(10) ? m > M : m >= M) || count <= 0) continue;
    float v[8], more[8];
#pragma unroll
    for (int c = 0; c < 8; c++) v[c] = static_cast<float>(tile[token * Tile::kSumPitch + row + c]);
    if constexpr (sizeof(T) == 1) {
      const float x_scale = x_scales[m];
#pragma unroll
      for (int c = 0; c < 8; c++) v[c] *= x_scale * (c < count ? scales[bug(11) ? row + c : n + c] : 0.0f);
    }
    if (bias != nullptr) {
      load8(more, bias + n, count, aligned);
#pragma unroll
      for (int c = 0; c < 8; c++) v[c] += more[c];
    }
    if (residual != nullptr) {
      load8(more, residual + int64_t(m) * N + n, count, aligned);
#pragma unroll
      for (int c = 0; c < 8; c++) v[c] += more[c];
    }
#pragma unroll
    for (int c = 0; c < 8; c++) v[c] = activate(v[c], activation);
    store8(y + int64_t(m) * N + n, v, count, aligned);
  }
}

}  // namespace

// nm_linear for at most 8 tokens: the weights are read once, straight into the registers mma.sp takes them from.
//
// A block computes 16 rows of W for all tokens; its warps share the columns, a chunk of 128 bytes of x at a time. In a
// chunk, lane t of the four that share a row reads 16 bytes of values: 4 pieces of 4 bytes, of which pieces 2 j and
// 2 j + 1 are its part of operand A in step j. mma.sp then takes for neighbours columns that are not: any order of
// columns will do as long as x and the positions follow it.
//
//   operand A, x   piece 2 j + c of lane t stands for bytes 32 t + 16 j + 8 c to 32 t + 16 j + 8 c + 7 of x
//   positions      come for the columns in order, and are gathered: a nibble (16-bit types) or byte (int8) of each lane
#pragma once

#include "../finish.h"
#include "../ptx.h"

namespace {

constexpr int kMostFewTokens = 8;
constexpr int kFewRows = 16, kFewWarps = 8, kFewThreads = 32 * kFewWarps;
constexpr int kFewSumPitch = 20;  // of a token: 16 rows, so that the sums of a fragment meet different banks
constexpr int kChunkBytes = 128;  // of x

template <class T>
struct Chunk {
  uint32_t values[2][4];  // of rows g and g + 8
  uint32_t packed[4];     // 16-bit types: 64 columns of row g, then of row g + 8; int8: 128 of row g + 8 (t % 2)
  uint32_t x[2][4];       // operand B of the two steps

  __device__ __forceinline__ void load(
      const T* x_any, const T* values_any, const uint8_t* packed_any, int chunk, int row, int M, int N, int K) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int64_t x_row = int64_t(K) * sizeof(T), first = int64_t(chunk) * kChunkBytes, left = x_row - first;
    const int64_t rows[2] = {min(row + g, N - 1), min(row + g + 8, N - 1)};
    const unsigned char* from_values = reinterpret_cast<const unsigned char*>(values_any) + first / 2 + 16 * t;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const bool inside = bug(27) ? 32 * t <= left : 32 * t < left;
      const uint4 v = inside ? __ldg(reinterpret_cast<const uint4*>(from_values + rows[h] * (x_row / 2))) : uint4{};
      values[h][0] = v.x, values[h][1] = v.y, values[h][2] = v.z, values[h][3] = v.w;
    }
    load_packed(packed_any, chunk, rows, t, K);
    const unsigned char* from_x = reinterpret_cast<const unsigned char*>(x_any) + g * x_row + first;
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int lane_of_values = 2 * (i & 1) + (t >> 1);
        const int at = 32 * lane_of_values + 16 * step + 8 * (i >> 1) + 4 * (t & 1);
        const bool inside = 32 * lane_of_values < left && (bug(26) ? g <= M : g < M);
        x[step][i] = inside ? __ldg(reinterpret_cast<const uint32_t*>(from_x + at)) : 0;
      }
  }

  // Words of padding are as many_tokens.h has them.
  __device__ __forceinline__ void load_packed(
      const uint8_t* packed_any, int chunk, const int64_t (&rows)[2], int t, int K) {
    constexpr uint32_t kPadded = 0x44444444;
    const int packed_row = (K + 63) / 64 * 8;
    if constexpr (sizeof(T) == 2) {
      const int columns = K - chunk * 64;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint2 word = __ldg(reinterpret_cast<const uint2*>(packed_any + rows[h] * packed_row + chunk * 8));
        const uint32_t low = columns >= 32 ? ~0u : (1u << columns) - 1;  // a bit for each column
        const uint32_t high = columns >= 64 ? ~0u : columns > 32 ? (1u << (columns - 32)) - 1 : 0;
        packed[2 * h] = (word.x & low) | (kPadded & ~low);
        packed[2 * h + 1] = (word.y & high) | (kPadded & ~high);
      }
    } else {
      const int columns = K - chunk * 128;
      const uint8_t* from = packed_any + (t & 1 ? rows[1] : rows[0]) * packed_row + chunk * 16;
      const uint2 low = __ldg(reinterpret_cast<const uint2*>(from));
      const uint2 high = columns > 64 ? __ldg(reinterpret_cast<const uint2*>(from + 8)) : uint2{kPadded, kPadded};
      packed[0] = low.x;
      packed[1] = columns > 32 ? low.y : kPadded;
      packed[2] = high.x;
      packed[3] = columns > 96 ? high.y : kPadded;
    }
  }

  // The metadata of both steps (16-bit types, chosen by kSelector) or of one (int8).
  __device__ __forceinline__ uint32_t metadata(int step) const {
    const int t = threadIdx.x & 3;
    if constexpr (sizeof(T) == 2) {  // lane t = 2 step + c: nibble t of each of the 4 lanes' 16 bits
      const int nibble = bug(23) ? t ^ 1 : t;
      uint32_t rows[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t low = packed[2 * h] >> 4 * nibble & 0x000f000f;
        const uint32_t high = packed[2 * h + 1] >> 4 * nibble & 0x000f000f;
        rows[h] = ((low | low >> 12) & 0xff) | ((high | high >> 12) & 0xff) << 8;
      }
      return rows[0] | rows[1] << 16;
    } else {  // byte 2 step + t / 2 of each of the 4 lanes' 32 bits
      const int byte = 2 * step + ((bug(23) ? t ^ 2 : t) >> 1), pair = byte | (byte + 4) << 4;
      return __byte_perm(__byte_perm(packed[0], packed[1], pair), __byte_perm(packed[2], packed[3], pair), 0x5410);
    }
  }
};

template <class T, class Out>
__device__ __forceinline__ void few_tokens(NM_LINEAR_PARAMETERS(T, Out)) {
  using Mma = ptx::MmaSp<T>;
  using Sum = typename Mma::Sum;
  __shared__ Sum shared[kFewWarps][kMostFewTokens * kFewSumPitch];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int first_row = blockIdx.x * kFewRows;
  const int chunks = (K + kChunkBytes / int(sizeof(T)) - 1) / (kChunkBytes / int(sizeof(T)));

  Sum sums[4] = {};
  Chunk<T> next;
  if (warp < chunks) next.load(x, values, packed, warp, first_row, M, N, K);
  for (int k = warp; k < chunks; k += kFewWarps) {
    const Chunk<T> now = next;
    if (k + kFewWarps < chunks) next.load(x, values, packed, k + kFewWarps, first_row, M, N, K);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const uint32_t e = now.metadata(step);
      const int second = bug(22) ? 1 : 0;
      const uint32_t a[4] = {now.values[0][2 * step], now.values[1][2 * step + second], now.values[0][2 * step + 1],
                             now.values[1][2 * step + 1 - second]};
      if (sizeof(T) == 1 || step == 0 || bug(24))
        Mma::template run<0>(sums, a, now.x[step], e);
      else
        Mma::template run<sizeof(T) == 2>(sums, a, now.x[step], e);
    }
  }

#pragma unroll
  for (int c = 0; c < 4; c++)
    shared[warp][(2 * t + (c & 1)) * kFewSumPitch + g + 8 * (c >> 1)] = sums[c];
  if constexpr (!bug(21)) __syncthreads();

  const int row = threadIdx.x % kFewRows, m = threadIdx.x / kFewRows, n = first_row + row;
  if (m >= M || n >= N) return;
  Sum sum = 0;
#pragma unroll
  for (int w = bug(25) ? 1 : 0; w < kFewWarps; w++) sum += shared[w][m * kFewSumPitch + row];
  float v = static_cast<float>(sum);
  if constexpr (sizeof(T) == 1) v *= x_scales[m] * scales[bug(28) ? row : n];
  if (bias != nullptr) v += to_float(bias[n]);
  if (residual != nullptr) v += to_float(residual[int64_t(m) * N + n]);
  y[int64_t(m) * N + n] = from_float<Out>(activate(v, activation));
}

}  // namespace

// The micro-kernels of bsr_linear. Compiled once per instruction set: see avx512.cpp and its siblings.
//
// Many tokens: lanes run over tokens. A tile of x is transposed to feature-major [K][T], T = R vectors
// of tokens; each block then loads R vectors of x per input and feeds BN outputs from them, one
// broadcast weight each, so BN * R accumulators stay in registers and indices cost one load per block.
//
// Few tokens (decode): lanes run over outputs. A block's column is one contiguous vector of weights,
// multiplied by one broadcast input per token; weights stream once and set the pace.
#include "../vec_math.h"
#include "bsr_linear.h"

namespace {

constexpr int kGroup = 16;         // output rows that the epilogue transposes and stores together
constexpr int kEpilogueCost = 8;   // of a row, in units of one stored weight
constexpr int kPrefetchTile = 2048, kPrefetchDecode = 4096;  // bytes ahead in the weight stream

SNLP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Work in rows [0, row): stored weights plus the epilogue.
SNLP_INLINE int64_t cost_before(const BsrLinear& a, int64_t row) {
  const int64_t block_row = row / a.n, inside = row % a.n;
  int64_t weights = (int64_t)a.crow[block_row] * a.n * a.k;
  if (inside) weights += inside * (a.crow[block_row + 1] - a.crow[block_row]) * a.k;
  return weights + row * kEpilogueCost;
}

// The first multiple of `step` rows before which at least `cost` of work lies.
SNLP_INLINE int64_t row_at_cost(const BsrLinear& a, int64_t cost, int64_t step) {
  int64_t low = 0, high = (a.N + step - 1) / step;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost_before(a, smaller(middle * step, a.N)) < cost)
      low = middle + 1;
    else
      high = middle;
  }
  return smaller(low * step, a.N);
}

// ---- many tokens ----

// tile[k][T] = x[token0 + t][k] for t < tokens, zero beyond.
template <int R>
void pack_tile(const float* x, int64_t K, int64_t tokens, float* tile) {
  constexpr int T = R * kLanes;
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes)
    for (int t = 0; t < T; t += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = t + i < tokens ? load(x + (t + i) * K + k) : Vec{};
      transpose(r);
      for (int i = 0; i < kLanes; i++) store(tile + (k + i) * T + t, r[i]);
    }
  for (; k < K; k++)
    for (int t = 0; t < T; t++) tile[k * T + t] = t < tokens ? x[t * K + k] : 0.0f;
}

// out[BN][T] = sum over `count` blocks of BN rows of the block times the tile. `values` points at the
// first of the BN rows in the first block; a block is n x k, column-major.
template <int BN, int R, int N1, bool K1>
SNLP_INLINE void tile_rows(
    const float* tile, const int32_t* col, int64_t count, const float* values, int n_any, int k_any, float* out) {
  constexpr int T = R * kLanes;
  const int64_t n = N1 ? N1 : n_any, k = K1 ? 1 : k_any;
  Vec sum[BN][R] = {};
  for (int64_t p = 0; p < count; p++) {
    const float* x = tile + (int64_t)col[p] * k * T;
    __builtin_prefetch((const char*)values + kPrefetchTile);
    for (int64_t b = 0; b < k; b++, x += T, values += n) {
      Vec xv[R];
      SNLP_UNROLL for (int r = 0; r < R; r++) xv[r] = load(x + r * kLanes);
      SNLP_UNROLL for (int j = 0; j < BN; j++) SNLP_UNROLL for (int r = 0; r < R; r++) sum[j][r] += xv[r] * values[j];
    }
  }
  for (int j = 0; j < BN; j++)
    for (int r = 0; r < R; r++) store(out + j * T + r * kLanes, sum[j][r]);
}

// y[token][row0 ...] = act(outᵀ + bias) for `rows` of kGroup rows and `tokens` of T tokens.
template <int R, int A>
void epilogue(const BsrLinear& a, const float* out, int64_t token0, int64_t tokens, int64_t row0, int64_t rows) {
  constexpr int T = R * kLanes;
  for (int j = 0; j < rows; j += kLanes) {
    const int64_t wide = smaller(kLanes, rows - j);
    float bias[kLanes] = {};
    if (a.bias) memcpy(bias, a.bias + row0 + j, wide * sizeof(float));
    const Vec b = load(bias);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = load(out + (j + i) * T + t);
      transpose(r);
      float* y = a.y + (token0 + t) * a.N + row0 + j;
      if (wide == kLanes && t + kLanes <= tokens) {
        SNLP_UNROLL for (int i = 0; i < kLanes; i++) store(y + i * a.N, activate<A>(r[i] + b));
      } else {
        for (int64_t i = 0; i < smaller(kLanes, tokens - t); i++)
          store_first<kLanes>(y + i * a.N, activate<A>(r[i] + b), wide);
      }
    }
  }
}

template <int R>
SNLP_INLINE void epilogue(const BsrLinear& a, const float* out, int64_t token0, int64_t tokens, int64_t row0, int64_t rows) {
  switch (a.activation) {
    case kRelu: return epilogue<R, kRelu>(a, out, token0, tokens, row0, rows);
    case kGelu: return epilogue<R, kGelu>(a, out, token0, tokens, row0, rows);
    case kGeluTanh: return epilogue<R, kGeluTanh>(a, out, token0, tokens, row0, rows);
    default: return epilogue<R, kNone>(a, out, token0, tokens, row0, rows);
  }
}

template <int BN, int R, int N1, bool K1>
void tile_range(const BsrLinear& a, const float* tile, float* out, int64_t token0, int64_t tokens, int64_t begin, int64_t end) {
  constexpr int T = R * kLanes;
  for (int64_t row0 = begin; row0 < end; row0 += kGroup) {
    const int64_t rows = smaller(kGroup, end - row0);
    for (int64_t j = 0; j < rows; j += BN) {
      const int64_t block_row = (row0 + j) / a.n, inside = (row0 + j) % a.n;
      const int64_t first = a.crow[block_row], count = a.crow[block_row + 1] - first;
      tile_rows<BN, R, N1, K1>(
          tile, a.col + first, count, a.values + first * a.n * a.k + inside, a.n, a.k, out + j * T);
    }
    epilogue<R>(a, out, token0, tokens, row0, rows);
  }
}

template <int BN, int R, int N1, bool K1>
void one_tile(const BsrLinear& a, float* tile, int64_t token0, int64_t tokens, int64_t begin, int64_t end) {
  alignas(64) float out[kGroup * R * kLanes];
  pack_tile<R>(a.x + token0 * a.K, a.K, tokens, tile);
  tile_range<BN, R, N1, K1>(a, tile, out, token0, tokens, begin, end);
}

// This part's share of (tiles x rows), cut by work. A ragged last tile runs as narrow as it can.
template <int BN, int R, int N1, bool K1>
void many_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  constexpr int T = R * kLanes;
  const int64_t tiles = (a.M + T - 1) / T, per_tile = cost_before(a, a.N);
  const int64_t from = tiles * per_tile * part / parts, to = tiles * per_tile * (part + 1) / parts;
  for (int64_t tile = from / per_tile; tile < tiles && tile * per_tile < to; tile++) {
    const int64_t begin = row_at_cost(a, from - tile * per_tile, kGroup);
    const int64_t end = row_at_cost(a, to - tile * per_tile, kGroup);
    if (begin >= end) continue;
    const int64_t token0 = tile * T, tokens = smaller(T, a.M - token0);
    if (tokens <= kLanes)
      one_tile<BN, 1, N1, K1>(a, scratch, token0, tokens, begin, end);
    else if (tokens <= 2 * kLanes && R > 2)
      one_tile<BN, 2, N1, K1>(a, scratch, token0, tokens, begin, end);
    else
      one_tile<BN, R, N1, K1>(a, scratch, token0, tokens, begin, end);
  }
}

template <int BN, int R, int N1>
SNLP_INLINE void many_tokens(const BsrLinear& a, int part, int parts, float* scratch) {
  if (a.k == 1) return many_tokens<BN, R, N1, true>(a, part, parts, scratch);
  many_tokens<BN, R, N1, false>(a, part, parts, scratch);
}

// ---- few tokens ----

// Rows [0, L) of one block row's blocks, MT tokens: acc[m] = sum of weight columns times x.
template <int L, int MT, int A>
SNLP_INLINE void decode_rows(const BsrLinear& a, int64_t token0, int64_t block_row, int64_t inside) {
  constexpr int U = MT >= 8 ? 1 : 8 / MT;  // independent sums, to cover the latency of an FMA
  const int64_t n = a.n, k = a.k, first = a.crow[block_row], last = a.crow[block_row + 1];
  const float* values = a.values + first * n * k + inside;
  const float* x = a.x + token0 * a.K;
  VecL<L> sum[U][MT] = {};
  int64_t p = first;
  if (k == 1)
    for (; p + U <= last; p += U) {
      SNLP_UNROLL for (int u = 0; u < U; u++, values += n) {
        __builtin_prefetch((const char*)values + kPrefetchDecode);
        const VecL<L> w = load<L>(values);
        SNLP_UNROLL for (int m = 0; m < MT; m++) sum[u][m] += w * x[m * a.K + a.col[p + u]];
      }
    }
  for (; p < last; p++) {
    constexpr int V = U < 4 ? U : 4;
    const float* xb = x + a.col[p] * k;
    int64_t b = 0;
    for (; b + V <= k; b += V)
      SNLP_UNROLL for (int v = 0; v < V; v++, values += n) {
        __builtin_prefetch((const char*)values + kPrefetchDecode);
        const VecL<L> w = load<L>(values);
        SNLP_UNROLL for (int m = 0; m < MT; m++) sum[v][m] += w * xb[m * a.K + b + v];
      }
    for (; b < k; b++, values += n) {
      const VecL<L> w = load<L>(values);
      SNLP_UNROLL for (int m = 0; m < MT; m++) sum[0][m] += w * xb[m * a.K + b];
    }
  }
  const int64_t row = block_row * n + inside;
  for (int m = 0; m < MT; m++) {
    VecL<L> y = sum[0][m];
    for (int u = 1; u < U; u++) y += sum[u][m];
    if (a.bias) y += load<L>(a.bias + row);
    float lanes[kLanes] = {};
    store<L>(lanes, y);
    const Vec activated = activate<A>(load(lanes));
    store(lanes, activated);
    memcpy(a.y + (token0 + m) * a.N + row, lanes, L * sizeof(float));
  }
}

template <int L, int A>
void few_tokens(const BsrLinear& a, int part, int parts) {
  const int64_t total = cost_before(a, a.N);
  const int64_t begin = row_at_cost(a, total * part / parts, a.n);
  const int64_t end = row_at_cost(a, total * (part + 1) / parts, a.n);
  for (int64_t block_row = begin / a.n; block_row < end / a.n; block_row++)
    for (int64_t inside = 0; inside < a.n; inside += L) {
      int64_t m = 0;
      for (; m + 8 <= a.M; m += 8) decode_rows<L, 8, A>(a, m, block_row, inside);
      for (; m + 4 <= a.M; m += 4) decode_rows<L, 4, A>(a, m, block_row, inside);
      for (; m + 2 <= a.M; m += 2) decode_rows<L, 2, A>(a, m, block_row, inside);
      for (; m < a.M; m++) decode_rows<L, 1, A>(a, m, block_row, inside);
    }
}

template <int L>
SNLP_INLINE void few_tokens(const BsrLinear& a, int part, int parts) {
  switch (a.activation) {
    case kRelu: return few_tokens<L, kRelu>(a, part, parts);
    case kGelu: return few_tokens<L, kGelu>(a, part, parts);
    case kGeluTanh: return few_tokens<L, kGeluTanh>(a, part, parts);
    default: return few_tokens<L, kNone>(a, part, parts);
  }
}

// ---- gradient of the blocks ----

// Rows [inside, inside + L) and inputs of up to P blocks over one tile: lanes run over outputs, grad is
// read as it lies and x comes feature-major, so each product is one vector times one broadcast.
template <int L, int P>
SNLP_INLINE void wgrad_blocks(
    const BsrLinearWgrad& a, const float* grad, const float* tile, int64_t T, int64_t tokens, int64_t p,
    int64_t inside, bool first) {
  const int64_t n = a.n, k = a.k;
  for (int64_t b = 0; b < k; b++) {
    float* out = a.dvalues + (p * k + b) * n + inside;
    const float* x[P];
    VecL<L> sum[P];
    for (int i = 0; i < P; i++) {
      x[i] = tile + (a.col[p + i] * k + b) * T;
      sum[i] = first ? VecL<L>{} : load<L>(out + i * k * n);
    }
    for (int64_t t = 0; t < tokens; t++) {
      const VecL<L> g = load<L>(grad + t * a.N);
      SNLP_UNROLL for (int i = 0; i < P; i++) sum[i] += g * x[i][t];
    }
    for (int i = 0; i < P; i++) store<L>(out + i * k * n, sum[i]);
  }
}

// This part owns a range of block rows, cut by stored blocks, and sweeps all tokens over it.
template <int L>
void wgrad(const BsrLinearWgrad& a, int part, int parts, float* scratch) {
  constexpr int R = 2, T = R * kLanes, P = 8;
  const int64_t block_rows = a.N / a.n, total = a.crow[block_rows];
  int64_t begin = 0, end = 0;
  while (begin < block_rows && a.crow[begin] < total * part / parts) begin++;
  for (end = begin; end < block_rows && a.crow[end] < total * (part + 1) / parts;) end++;
  for (int64_t token0 = 0; token0 < a.M || token0 == 0; token0 += T) {
    const int64_t tokens = smaller(T, a.M - token0);
    pack_tile<R>(a.x + token0 * a.K, a.K, tokens, scratch);
    for (int64_t row = begin; row < end; row++)
      for (int64_t inside = 0; inside < a.n; inside += L) {
        const float* grad = a.grad + token0 * a.N + row * a.n + inside;
        int64_t p = a.crow[row];
        const int64_t last = a.crow[row + 1];
        for (; p + P <= last; p += P) wgrad_blocks<L, P>(a, grad, scratch, T, tokens, p, inside, token0 == 0);
        for (; p < last; p++) wgrad_blocks<L, 1>(a, grad, scratch, T, tokens, p, inside, token0 == 0);
      }
  }
}

// ---- entries ----

SNLP_INLINE void bsr_linear(const BsrLinear& a, int part, int parts, float* scratch) {
  if (a.decode()) {
    if (kLanes >= 16 && a.n % 16 == 0) return few_tokens<kLanes >= 16 ? 16 : 4>(a, part, parts);
    if (kLanes >= 8 && a.n % 8 == 0) return few_tokens<kLanes >= 8 ? 8 : 4>(a, part, parts);
    if (a.n % 4 == 0) return few_tokens<4>(a, part, parts);
    if (a.n % 2 == 0) return few_tokens<2>(a, part, parts);
    return few_tokens<1>(a, part, parts);
  }
  // BN x R accumulators: 16 of 32 registers, 12 of 16.
  constexpr bool kMany = kRegisters == 32;
  constexpr int BN = kMany ? 8 : 4, R = kMany ? 2 : 3, R4 = kMany ? 4 : 3;
  if (a.n == 8) return many_tokens<BN, R, 8>(a, part, parts, scratch);
  if (a.n == 16) return many_tokens<BN, R, 16>(a, part, parts, scratch);
  if (a.n == 4) return many_tokens<4, R4, 4>(a, part, parts, scratch);
  if (a.n % 8 == 0) return many_tokens<BN, R, 0>(a, part, parts, scratch);
  if (a.n % 4 == 0) return many_tokens<4, R4, 0>(a, part, parts, scratch);
  if (a.n % 2 == 0) return many_tokens<2, 4, 0>(a, part, parts, scratch);
  return many_tokens<1, 4, 0>(a, part, parts, scratch);
}

SNLP_INLINE void bsr_linear_wgrad(const BsrLinearWgrad& a, int part, int parts, float* scratch) {
  if (kLanes >= 16 && a.n % 16 == 0) return wgrad<kLanes >= 16 ? 16 : 4>(a, part, parts, scratch);
  if (kLanes >= 8 && a.n % 8 == 0) return wgrad<kLanes >= 8 ? 8 : 4>(a, part, parts, scratch);
  if (a.n % 4 == 0) return wgrad<4>(a, part, parts, scratch);
  if (a.n % 2 == 0) return wgrad<2>(a, part, parts, scratch);
  return wgrad<1>(a, part, parts, scratch);
}

}  // namespace

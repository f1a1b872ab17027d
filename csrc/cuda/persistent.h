// sparse_lstm and sparse_gru for at most 8 sequences: one launch for all steps.
//
// A block has `units` hidden units, all gates of them. It loads its rows of W_hh into shared memory once, and keeps the
// cells in registers. At each step it copies the state of all units, multiplies, and writes the state of its own into
// the other half of h; then it waits until every block has. The launch is cooperative: all blocks run at once.
//
// A thread sums one row over every splits-th of its stored columns, for all sequences; then a thread is a unit of a
// sequence, adds up what the splits have, and does the gates.
//
// Source: persistent recurrent kernels after Diamos et al. 2016, "Persistent RNNs: Stashing Recurrent Weights On-Chip",
// and Zhu et al. 2018, "Sparse Persistent RNNs", arXiv:1804.10223.
#pragma once

#include "finish.h"
#include "ptx.h"
#include "recurrent.h"

#define RECURRENT_PARAMETERS(T)                                                                                     \
  const T *__restrict__ inputs, const T *__restrict__ bias, const int32_t *__restrict__ crow,                       \
      const int32_t *__restrict__ col, const T *__restrict__ values, T *h, float *c, T *y, T *h_n,            \
      float *gates, float *cells, const int32_t *__restrict__ table, uint32_t *counter, int steps,          \
      int batch, int hidden, int n, int k, int half, int y_stride, int units, int capacity
#define RECURRENT_NAMES                                                                                           \
  inputs, bias, crow, col, values, h, c, y, h_n, gates, cells, table, counter, steps, batch, hidden, n, k, \
      half, y_stride, units, capacity

namespace {

constexpr int kPersistentThreads = 256;
constexpr int kLeastUnits = 8, kMostUnits = 64;  // of a block; 4 gates of the most are a row for each thread

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }
__device__ __forceinline__ float tanh_of(float v) { return 2.0f * sigmoid(2.0f * v) - 1.0f; }

// All blocks meet between steps: each counts itself in when its writes are done, and waits for the others.
__device__ __forceinline__ void arrive(uint32_t* counter) {
  if constexpr (!bug(1)) __syncthreads();
  if (threadIdx.x != 0) return;
  if constexpr (bug(2))
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  else
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait(const uint32_t* counter, uint32_t target) {
  if (threadIdx.x == 0 && !bug(3)) {
    uint32_t seen;
    do {
      if constexpr (bug(4))
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      else
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
  }
  if constexpr (!bug(5)) __syncthreads();
}

// The values of all sequences at one unit.
template <class T, int kBatch>
struct alignas(sizeof(T) * kBatch < 16 ? sizeof(T) * kBatch : 16) Units {
  T of[kBatch];
};

// Shared memory of a block, in this order; `bytes` is where the next begins.
struct SharedLayout {
  int64_t values, columns, sums, starts, bytes;

  __host__ __device__ SharedLayout(int size, int gates, int sequences, int half, int height, int units, int capacity) {
    const int rows = gates * units, splits = kPersistentThreads / rows;
    values = int64_t(half) * size;
    columns = (values + int64_t(capacity) * height * size + 3) / 4 * 4;
    sums = columns + int64_t(capacity) * 4;
    starts = sums + int64_t(splits) * rows * sequences * 4;
    bytes = starts + (rows / height + 1) * 4;
  }
};

// Rows of W_hh that a block reads: `height` of each block in a block row, one block row after the other ("segment").
// Stored column t of all segments is in segment q where starts[q] <= t < starts[q + 1].
template <class T>
struct Rows {
  const int32_t *crow, *col;
  const T* values;
  int n, k, hidden, units, first_unit, height, segments;

  __device__ __forceinline__ int block_row(int q) const {
    const int per_gate = units / height, gate = q / per_gate;
    return (gate * hidden + first_unit) / n + q % per_gate;
  }
  // Units past the last store nothing.
  __device__ __forceinline__ int stored(int q) const {
    const int at = block_row(q);
    return first_unit + q % (units / height) * height < hidden ? (crow[at + 1] - crow[at]) * k : 0;
  }
  // Column t of segment q.
  __device__ __forceinline__ int column(int q, int t) const { return col[crow[block_row(q)] + t / k] * k + t % k; }
  __device__ __forceinline__ T value(int q, int t, int r) const {
    const int64_t block = crow[block_row(q)] + t / k;
    return values[(block * n + first_unit % n + r) * k + t % k];
  }
};

template <class T, int kGates, int kBatch>
__device__ __forceinline__ void persistent(RECURRENT_PARAMETERS(T)) {
  constexpr int kCells = (kMostUnits * kBatch + kPersistentThreads - 1) / kPersistentThreads;  // of a thread
  extern __shared__ __align__(16) unsigned char shared[];
  const int tid = threadIdx.x, rows = kGates * units, splits = kPersistentThreads / rows;
  const int first_unit = blockIdx.x * units, height = min(n, units), segments = rows / height;
  const Rows<T> weight{crow, col, values, n, k, hidden, units, first_unit, height, segments};
  const SharedLayout layout(sizeof(T), kGates, kBatch, half, height, units, capacity);
  const Units<T, kBatch>* state = reinterpret_cast<const Units<T, kBatch>*>(shared);
  T* kept = reinterpret_cast<T*>(shared + layout.values);
  int* columns = reinterpret_cast<int*>(shared + layout.columns);
  float* sums = reinterpret_cast<float*>(shared + layout.sums);  // [split][sequence][row]
  int* starts = reinterpret_cast<int*>(shared + layout.starts);

  if (tid < segments) starts[tid + 1] = weight.stored(tid);
  __syncthreads();
  if (tid == 0) {
    starts[0] = 0;
    for (int q = 0; q < segments; q++) starts[q + 1] += starts[q];
  }
  __syncthreads();
  for (int q = 0; q < segments; q++) {
    const int first = starts[q], columns_kept = min(starts[q + 1], capacity) - first;
    for (int i = tid; i < columns_kept * height; i += kPersistentThreads) {
      const int t = i / height, r = i % height;
      kept[(first + t) * height + r] = weight.value(q, t, r);
      if (r == 0) columns[first + t] = weight.column(q, t);
    }
  }

  float own_c[kCells];
#pragma unroll
  for (int j = 0; j < kCells; j++) {
    const int cell = tid + j * kPersistentThreads, b = cell / units, unit = first_unit + cell % units;
    own_c[j] = kGates == 4 && b < batch && unit < hidden ? c[b * hidden + unit] : 0.0f;
  }

  const int row = tid % rows, split = tid / rows, q = row / height, r = row % height;
  for (int step = 0; step < steps; step++) {
    const int start = table[2 * step], size = table[2 * step + 1], following = table[2 * step + 3];
    float from_input[kCells][kGates];  // asked for before the wait
#pragma unroll
    for (int j = 0; j < kCells; j++) {
      const int cell = tid + j * kPersistentThreads, b = cell / units, unit = first_unit + cell % units;
      const int64_t at = int64_t(start + b) * (kGates * hidden) + unit;
#pragma unroll
      for (int g = 0; g < kGates; g++)
        from_input[j][g] = b < size && unit < hidden ? to_float(inputs[at + g * hidden]) : 0.0f;
    }

    if (step > 0) wait(counter, (bug(6) ? step - 1 : step) * gridDim.x);
    const unsigned char* from = reinterpret_cast<const unsigned char*>(h + (step & 1) * int64_t(half));
    for (int i = 16 * tid; i < half * int(sizeof(T)); i += 16 * kPersistentThreads)
      ptx::cp_async<16>(shared + i, from + i, true);
    ptx::cp_async_commit();
    if constexpr (!bug(7)) ptx::cp_async_wait<0>();
    __syncthreads();

    if (split < splits) {
      float total[kBatch] = {};
      const int first = starts[q], last = starts[q + 1], last_kept = min(last, capacity);
      const auto add = [&](int column, float w) {
        const Units<T, kBatch> v = state[column];
#pragma unroll
        for (int b = 0; b < kBatch; b++) total[b] += w * to_float(v.of[b]);
      };
      int t = first + split;
      for (; t < last_kept; t += splits) add(columns[t], to_float(kept[t * height + (bug(8) ? 0 : r)]));
      for (; t < (bug(9) ? last_kept : last); t += splits)
        add(weight.column(q, t - first), to_float(weight.value(q, t - first, r)));
#pragma unroll
      for (int b = 0; b < kBatch; b++) sums[(split * kBatch + b) * rows + row] = total[b];
    }
    if constexpr (!bug(10)) __syncthreads();

    T* to = h + ((bug(11) ? step : step + 1) & 1) * int64_t(half);
#pragma unroll
    for (int j = 0; j < kCells; j++) {
      const int cell = tid + j * kPersistentThreads, b = cell / units, own = cell % units, unit = first_unit + own;
      if (b >= (bug(12) ? batch : size) || unit >= hidden) continue;
      float from_state[kGates];
#pragma unroll
      for (int g = 0; g < kGates; g++) {
        from_state[g] = bias == nullptr ? 0.0f : to_float(bias[g * hidden + unit]);
        for (int s = 0; s < splits; s++) from_state[g] += sums[(s * kBatch + b) * rows + g * units + own];
      }
      const float* in = from_input[j];
      const float first = sigmoid(in[0] + from_state[0]), second = sigmoid(in[1] + from_state[1]);
      float third, fourth, out;
      if constexpr (kGates == 4) {  // input, forget, cell, output
        third = tanh_of(in[2] + from_state[2]);
        fourth = sigmoid(in[3] + from_state[3]);
        own_c[j] = second * own_c[j] + first * third;
        out = fourth * tanh_of(own_c[j]);
      } else {  // reset, update, new
        third = tanh_of(in[2] + first * from_state[2]);
        fourth = from_state[2];
        out = third + second * (to_float(state[unit].of[b]) - third);
      }
      const int64_t token = start + b;
      const T rounded = from_float<T>(out);
      to[unit * kBatch + b] = rounded;
      y[token * y_stride + unit] = rounded;
      if (b >= following) {
        h_n[b * hidden + unit] = rounded;
        if constexpr (kGates == 4) c[b * hidden + unit] = own_c[j];
      }
      if (gates != nullptr) {
        const float all[4] = {first, second, third, fourth};
#pragma unroll
        for (int g = 0; g < 4; g++) gates[(token * 4 + g) * hidden + unit] = all[g];
      }
      if (kGates == 4 && cells != nullptr) cells[token * hidden + unit] = own_c[j];
    }
    if (step + 1 < steps) arrive(counter);
  }
}

template <class T>
constexpr int kRecurrentDtype = -1;
template <> constexpr int kRecurrentDtype<float> = kRecurrentFloat32;
template <> constexpr int kRecurrentDtype<__half> = kRecurrentFloat16;
template <> constexpr int kRecurrentDtype<__nv_bfloat16> = kRecurrentBFloat16;

constexpr int kernel_for(int sequences) { return sequences == 1 ? kOneSequence : kFewSequences; }

// A block has as few units as let all blocks run at once, of whole blocks of W_hh or of an equal part of one.
template <class T, int kGates, int kBatch>
RecurrentLaunch plan_persistent(const char* kernel, const RecurrentCuda& a, int processors, int shared_bytes) {
  RecurrentLaunch plan{{kernel, 0, kPersistentThreads, 0}, 0, 0};
  int units = kLeastUnits;
  while (units <= kMostUnits && ((units % a.n && a.n % units) || (a.H + units - 1) / units > processors)) units++;
  if (units > kMostUnits || a.B > kBatch || a.H % a.n || a.half < a.H * kBatch) return plan;
  const int height = a.n < units ? a.n : units;
  const int64_t fixed = SharedLayout(sizeof(T), kGates, kBatch, a.half, height, units, 0).bytes + 4;
  const int64_t all = int64_t(kGates) * units / height * a.H;
  int64_t capacity = (shared_bytes - fixed) / (height * int64_t(sizeof(T)) + 4);
  if (capacity < 0) return plan;
  if (capacity > all) capacity = all;
  const SharedLayout layout(sizeof(T), kGates, kBatch, a.half, height, units, static_cast<int>(capacity));
  plan.launch.blocks = (a.H + units - 1) / units;
  plan.launch.shared_bytes = static_cast<int>(layout.bytes);
  plan.units = units;
  plan.capacity = static_cast<int>(capacity);
  return plan;
}

#define TRY(call)                                           \
  do {                                                      \
    const cudaError_t error = call;                         \
    if (error != cudaSuccess) return error;                 \
  } while (0)

template <class T, int kGates, int kBatch>
cudaError_t run_persistent(
    void (*kernel)(RECURRENT_PARAMETERS(T)), const char* name, const RecurrentCuda& a, cudaStream_t stream) {
  int device, processors, shared, fit;
  TRY(cudaGetDevice(&device));
  TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const RecurrentLaunch plan = plan_persistent<T, kGates, kBatch>(name, a, processors, shared);
  const CudaLaunch& launch = plan.launch;
  if (launch.blocks < 1) return cudaErrorInvalidConfiguration;
  if (launch.blocks * a.T > INT32_MAX) return cudaErrorInvalidValue;
  TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes));
  TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, launch.threads, launch.shared_bytes));
  if (launch.blocks > int64_t(fit) * processors) return cudaErrorCooperativeLaunchTooLarge;
  TRY(cudaMemsetAsync(a.counter, 0, sizeof(uint32_t), stream));
  RecurrentCuda p = a;
  int units = plan.units, capacity = plan.capacity;
  void* arguments[] = {&p.inputs, &p.bias, &p.crow_indices, &p.col_indices, &p.values, &p.h, &p.c, &p.y,
                       &p.h_n, &p.gates, &p.cells, &p.table, &p.counter, &p.T, &p.B,
                       &p.H, &p.n, &p.k, &p.half, &p.y_stride, &units, &capacity};
  return cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads),
      arguments, launch.shared_bytes, stream);
}

#undef TRY

}  // namespace

// The kernels of an op with so many gates, as DO(op, gates, sequences in words, as a number, type in short, in full).
#define PERSISTENT_KERNELS(DO, op, gates)       \
  DO(op, gates, one, 1, f32, float)             \
  DO(op, gates, one, 1, f16, __half)            \
  DO(op, gates, one, 1, bf16, __nv_bfloat16)    \
  DO(op, gates, few, 8, f32, float)             \
  DO(op, gates, few, 8, f16, __half)            \
  DO(op, gates, few, 8, bf16, __nv_bfloat16)

#define PERSISTENT_KERNEL(op, gates, words, sequences, short_type, T)          \
  extern "C" __global__ void __launch_bounds__(kPersistentThreads, 1)          \
      op##_##words##_##short_type(RECURRENT_PARAMETERS(T)) {                   \
    persistent<T, gates, sequences>(RECURRENT_NAMES);                          \
  }
#define PERSISTENT_RUN(op, gates, words, sequences, short_type, T)                        \
  if (arguments->dtype == kRecurrentDtype<T> && kernel == kernel_for(sequences))          \
    return run_persistent<T, gates, sequences>(                                           \
        op##_##words##_##short_type, #op "_" #words "_" #short_type, *arguments, static_cast<cudaStream_t>(stream));
#define PERSISTENT_PLAN(op, gates, words, sequences, short_type, T)                                           \
  if (arguments->dtype == kRecurrentDtype<T> && kernel == kernel_for(sequences)) {                            \
    *launch = plan_persistent<T, gates, sequences>(                                                           \
        #op "_" #words "_" #short_type, *arguments, processors, shared_bytes);                                \
    return cudaSuccess;                                                                                       \
  }

// The kernels of an op, and the functions of RECURRENT_OP.
#define PERSISTENT_OP(op, gates)                                                                              \
  PERSISTENT_KERNELS(PERSISTENT_KERNEL, op, gates)                                                            \
  RECURRENT_OP(op)                                                                                            \
  int sparsenlp_##op(const RecurrentCuda* arguments, int kernel, void* stream) {                              \
    PERSISTENT_KERNELS(PERSISTENT_RUN, op, gates)                                                             \
    return cudaErrorInvalidValue;                                                                             \
  }                                                                                                           \
  int sparsenlp_##op##_plan(                                                                                  \
      const RecurrentCuda* arguments, int kernel, int processors, int shared_bytes, RecurrentLaunch* launch) { \
    PERSISTENT_KERNELS(PERSISTENT_PLAN, op, gates)                                                            \
    return cudaErrorInvalidValue;                                                                             \
  }

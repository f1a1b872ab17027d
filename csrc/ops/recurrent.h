// What sparse_lstm and sparse_gru share: checks, the matrices of a direction, and the order of its steps over threads.
//
// A direction is a list of phases, which its parts finish one after another: the projection of the inputs of as many
// steps as fit the cache, then these steps one by one. In a step a part computes all gates of its own units, so
// that it reads the same rows of the weights at each step, and one barrier is enough. Directions do not meet.
#pragma once

#include "../cpu/bsr_linear/bsr_linear.h"
#include "parts.h"

#include <cstring>
#include <deque>

#define FORWARD(isa, dtype, suffix)                       \
  BsrLinearKernel bsr_linear_##dtype##_##suffix;          \
  BsrLinearPackKernel bsr_linear_pack_##dtype##_##suffix; \
  BsrLinearPackedKernel bsr_linear_packed_##dtype##_##suffix;
#include "../cpu/bsr_linear/bsr_linear.inc"

namespace recurrent {

enum Dtype { f32, bf16, i8 };
typedef std::vector<Tensor> Tensors;

inline BsrLinearKernel* linear_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_##type##_##suffix},
  const Listed<BsrLinearKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

inline BsrLinearPackKernel* pack_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_pack_##type##_##suffix},
  const Listed<BsrLinearPackKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

inline BsrLinearPackedKernel* packed_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_packed_##type##_##suffix},
  const Listed<BsrLinearPackedKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

inline Dtype dtype_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  op, ": expected x of dtype float32 or bfloat16");
  return x.scalar_type() == ScalarType::Float ? f32 : bf16;
}

inline int64_t bytes_of(Dtype dtype) { return dtype == f32 ? 4 : dtype == bf16 ? 2 : 1; }

inline char* bytes(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }
inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline Tensor checked(
    const char* op, const Tensor& t, Dtype dtype, const std::vector<int64_t>& sizes, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == (dtype == f32 ? ScalarType::Float : ScalarType::BFloat16) && sizes_of(t) == sizes,
                  op, ": expected ", name, " of another shape or dtype");
  return as_contiguous(t);
}

inline Tensor copy_of(const Tensor& t) {
  Tensor result = empty(sizes_of(t), t.scalar_type());
  const size_t item = t.scalar_type() == ScalarType::Float ? 4 : 2;
  if (t.numel()) std::memcpy(result.data_ptr(), t.data_ptr(), t.numel() * item);
  return result;
}

// Elements as float, and back, rounded to the nearest; bfloat16 is the upper half of a float.
inline float read(const float& element) { return element; }
inline float read(const uint16_t& element) {
  const uint32_t bits = static_cast<uint32_t>(element) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void write(float& element, float value) { element = value; }
inline void write(uint16_t& element, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  element = static_cast<uint16_t>(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
}

// bfloat16 as float, and back.
inline Tensor widened(const Tensor& t) {
  Tensor result = empty(sizes_of(t), ScalarType::Float);
  const uint16_t* from = static_cast<const uint16_t*>(t.data_ptr());
  for (int64_t i = 0; i < static_cast<int64_t>(t.numel()); i++) floats(result)[i] = read(from[i]);
  return result;
}

inline void narrow(const Tensor& wide, const Tensor& result) {
  uint16_t* to = static_cast<uint16_t*>(result.data_ptr());
  for (int64_t i = 0; i < static_cast<int64_t>(wide.numel()); i++) write(to[i], floats(wide)[i]);
}

// What the forward pass keeps for the backward pass, in float; nothing unless `save`.
inline Tensor saved_tensor(bool save, const std::vector<int64_t>& sizes) {
  return empty(save ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
}

inline void check_saved(const char* op, const Tensor& t, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && sizes_of(t) == sizes && t.is_contiguous(),
                  op, ": expected what the forward pass saved, contiguous float32, of another shape");
}

// Two of `rows` for each direction, or none.
inline Tensors checked_biases(const char* op, const Tensors& biases, Dtype dtype, int64_t directions, int64_t rows) {
  STD_TORCH_CHECK(biases.empty() || static_cast<int64_t>(biases.size()) == 2 * directions,
                  op, ": expected two biases for each direction, or none");
  Tensors result;
  for (const Tensor& bias : biases) result.push_back(checked(op, bias, dtype, {rows}, "biases"));
  return result;
}

// The steps of a layer in the order of time: their first token and how many sequences reach them.
struct Steps {
  std::vector<int64_t> start, size;
  int64_t tokens = 0, batch = 0;

  Steps(const char* op, const Tensor& x, const std::optional<Tensor>& batch_sizes) {
    if (!batch_sizes) {
      STD_TORCH_CHECK(x.dim() == 3 && x.size(0) > 0, op, ": expected x (T, B, K) with at least one step");
      size.assign(x.size(0), x.size(1));
    } else {
      STD_TORCH_CHECK(x.dim() == 2 && batch_sizes->dim() == 1 && batch_sizes->size(0) > 0 &&
                          batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->is_cpu() &&
                          batch_sizes->is_contiguous(),
                      op, ": expected x (tokens, K) with contiguous int64 batch_sizes (T) on the CPU");
      const int64_t* sizes = static_cast<const int64_t*>(batch_sizes->data_ptr());
      size.assign(sizes, sizes + batch_sizes->size(0));
    }
    for (int64_t now : size) {
      STD_TORCH_CHECK(!batch_sizes || (now > 0 && (start.empty() || now <= batch)),
                      op, ": expected batch_sizes that never grow and stay above 0");
      start.push_back(tokens);
      tokens += now;
      batch = now;
    }
    batch = size[0];
    STD_TORCH_CHECK(!batch_sizes || tokens == x.size(0), op, ": expected batch_sizes that add up to ", x.size(0),
                    ", got ", tokens);
  }

  int64_t count() const { return static_cast<int64_t>(size.size()); }
  int64_t at(int64_t index, bool reverse) const { return reverse ? count() - 1 - index : index; }
};

// The lists of tensors that describe the matrices of a layer.
struct Matrices {
  const char* op;
  const Tensors &crow, &col, &values;
  const Tensors scales;
  Dtype dtype;  // of x
  int64_t each;  // per direction

  Matrices(const char* op, const Tensors& crow, const Tensors& col, const Tensors& values, const Tensors& scales,
           Dtype dtype, int64_t directions, int64_t least, int64_t most)
      : op(op), crow(crow), col(col), values(values), scales(scales), dtype(dtype) {
    STD_TORCH_CHECK(directions == 1 || directions == 2, op, ": expected 1 or 2 directions, got ", directions);
    each = static_cast<int64_t>(values.size()) / directions;
    STD_TORCH_CHECK(each * directions == static_cast<int64_t>(values.size()) && each >= least && each <= most,
                    op, ": expected ", least, " to ", most, " matrices for each direction, got ", values.size());
    STD_TORCH_CHECK(crow.size() == values.size() && col.size() == values.size() &&
                        (scales.empty() || scales.size() == values.size()),
                    op, ": expected as many crow_indices, col_indices and scales as values");
  }

  BsrLinear linear(int64_t at, int64_t N, int64_t K) const {
    const Tensor &rows = crow[at], &columns = col[at], &blocks = values[at];
    const bool quantized = !scales.empty();
    const ScalarType expected = quantized ? ScalarType::Char : dtype == f32 ? ScalarType::Float : ScalarType::BFloat16;
    STD_TORCH_CHECK(blocks.scalar_type() == expected && blocks.dim() == 3 && blocks.is_contiguous(),
                    op, ": expected contiguous values (nnzb, n, k) of the dtype of x, or int8 with scales");
    const auto is_index = [](const Tensor& t) {
      return t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_contiguous();
    };
    STD_TORCH_CHECK(is_index(rows) && is_index(columns), op,
                    ": expected contiguous 1-D int32 crow_indices and col_indices");
    BsrLinear a{};
    a.n = static_cast<int>(blocks.size(1));
    a.k = static_cast<int>(blocks.size(2));
    STD_TORCH_CHECK(a.n > 0 && a.k > 0 && K % a.k == 0 && rows.size(0) > 0 && (rows.size(0) - 1) * a.n == N,
                    op, ": expected matrix ", at, " to be ", N, " x ", K);
    STD_TORCH_CHECK(columns.size(0) == blocks.size(0) && ints(rows)[rows.size(0) - 1] == blocks.size(0),
                    op, ": crow_indices, col_indices and values disagree on the number of blocks");
    a.N = N;
    a.K = K;
    a.crow = ints(rows);
    a.col = ints(columns);
    a.values = blocks.data_ptr();
    a.half = dtype == bf16;
    if (quantized) {
      STD_TORCH_CHECK(a.k % 4 == 0 && K <= kInt8Columns, op, ": expected int8 blocks with k a multiple of 4 and at ",
                      "most ", kInt8Columns, " columns, got ", a.k, " and ", K);
      STD_TORCH_CHECK(scales[at].scalar_type() == ScalarType::Float && scales[at].dim() == 1 &&
                          scales[at].size(0) == N && scales[at].is_contiguous(),
                      op, ": expected contiguous float32 scales of shape (", N, ")");
      a.scales = static_cast<const float*>(scales[at].data_ptr());
    }
    return a;
  }

  BsrLinearGrad gradient(int64_t at, int64_t N, int64_t K) const {
    const BsrLinear a = linear(at, N, K);
    BsrLinearGrad grad{};
    grad.values = a.values;
    grad.crow = a.crow;
    grad.col = a.col;
    grad.N = N;
    grad.K = K;
    grad.n = a.n;
    grad.k = a.k;
    return grad;
  }

  Dtype weights() const { return scales.empty() ? dtype : i8; }
};

inline int64_t stored(const BsrLinear& a) { return int64_t{a.crow[a.N / a.n]} * a.n * a.k; }

// Rows [begin, end) of a matrix as a matrix of its own; both are multiples of n, or the end.
inline BsrLinear rows_between(BsrLinear a, int64_t begin, int64_t end) {
  a.crow += begin / a.n;
  if (a.scales) a.scales += begin;
  a.N = end - begin;
  return a;
}

// Bounds of `parts` shares of the units of a matrix with `gates` rows for each, H apart, of about equal work. One
// share if a block has rows of two gates.
inline std::vector<int64_t> share_units(const BsrLinear& a, int64_t gates, int64_t parts) {
  constexpr int64_t kUnitWork = 32;  // of the functions of one gate, in stored weights
  const int64_t H = a.N / gates;
  if (H % a.n) parts = 1;
  std::vector<int64_t> bounds(1, 0);
  const auto work_before = [&](int64_t unit) {
    int64_t blocks = 0;
    for (int64_t gate = 0; gate < gates; gate++) blocks += a.crow[(gate * H + unit) / a.n] - a.crow[gate * H / a.n];
    return blocks * a.n * a.k + unit * gates * kUnitWork;
  };
  const int64_t step = (15 + a.n) / a.n * a.n, all = parts > 1 ? work_before(H) : 0;
  for (int64_t part = 1, unit = 0; part < parts; part++) {
    while (unit < H && work_before(unit) * parts < all * part) unit = std::min(unit + step, H);
    bounds.push_back(unit);
  }
  bounds.push_back(H);
  return bounds;
}

// The block rows of the units [begin, end) in every gate, the shortest first.
inline std::vector<int32_t> rows_of_units(const BsrLinear& a, int64_t gates, int64_t begin, int64_t end) {
  const int64_t H = a.N / gates;
  std::vector<int32_t> rows;
  for (int64_t gate = 0; gate < gates; gate++)
    for (int64_t row = (gate * H + begin) / a.n; row * a.n < gate * H + end; row++)
      if (rows.empty() || rows.back() < row) rows.push_back(static_cast<int32_t>(row));  // may have rows of two gates
  const auto length = [&](int32_t row) { return a.crow[row + 1] - a.crow[row]; };
  std::stable_sort(rows.begin(), rows.end(), [&](int32_t one, int32_t other) { return length(one) < length(other); });
  return rows;
}

// The recurrent weights are packed, or the inputs of the steps [first, last) projected, or one of these steps done;
// steps count in the direction's order.
struct Phase {
  enum Kind { kPack, kInputs, kCells, kProject } kind;
  int64_t first, last, step;
};

// The phases of `steps` for inputs that are `columns` words wide.
inline std::vector<Phase> phases_of(const Steps& steps, int64_t columns, bool packed, bool projected) {
  constexpr int64_t kWords = 1 << 18, kTokens = 64;  // of inputs that are projected at a time; at least these tokens
  const int64_t most = std::max(kTokens, kWords / std::max<int64_t>(columns, 1));
  const int64_t chunk = std::max<int64_t>(1, most / std::max<int64_t>(steps.batch, 1));
  std::vector<Phase> phases;
  if (packed) phases.push_back({Phase::kPack, 0, 0, 0});
  for (int64_t first = 0; first < steps.count(); first += chunk) {
    const int64_t last = std::min(first + chunk, steps.count());
    phases.push_back({Phase::kInputs, first, last, first});
    for (int64_t step = first; step < last; step++) {
      phases.push_back({Phase::kCells, first, last, step});
      if (projected) phases.push_back({Phase::kProject, first, last, step});
    }
  }
  return phases;
}

// One direction of the forward pass.
struct Direction {
  BsrLinear input, recurrent, projection;  // N of the projection is 0 where there is none
  bool reverse;
  std::vector<int64_t> units, outputs;  // bounds of the parts
  std::vector<std::vector<int32_t>> rows;  // of the recurrent weights, of each part, where they are packed
  std::vector<float*> packed;
  char* inputs;     // tokens of a chunk x gates * H
  char* h[2];       // B x P: before and after even steps
  char* hidden;     // B x H, before the projection
  char* y;          // its columns of y
  char* h_n;        // B x P: before the first step, and after the last
};

// What a cell has to do: the units [begin, end) of the sequences of one step.
struct CellStep {
  const Direction* direction;
  int64_t token, M, begin, end;
  const void *inputs, *h_before;
  void *h, *h_n, *y;  // y is null where h is projected first
  const char* states; // gate g begins at states + g * states_gate
  int64_t states_gate, states_stride;
};

constexpr int64_t kPackedSteps = 4;  // from which on packing saves more time than it takes

// All steps of all directions. `cell` does a CellStep.
template <class Cell>
struct Forward {
  const Steps& steps;
  std::vector<Direction>& directions;
  const void* x;
  Dtype dtype, weights;
  int64_t gates, H, P;
  const Cell& cell;
  BsrLinearKernel* kernel = linear_kernel(weights);
  BsrLinearPackKernel* pack = pack_kernel(weights);
  BsrLinearPackedKernel* multiply_packed = packed_kernel(weights);

  int64_t y_stride() const { return static_cast<int64_t>(directions.size()) * P; }

  void run() {
    const Direction& first = directions[0];
    const int64_t item = bytes_of(dtype), count = static_cast<int64_t>(directions.size());
    const bool projected = first.projection.N > 0;
    const int64_t step_work = steps.batch * (stored(first.recurrent) + first.recurrent.N);
    const int64_t all_work = count * steps.tokens * (stored(first.recurrent) + stored(first.input) + first.recurrent.N);
    int64_t parts = parts_of(count, step_work);
    const bool packed = steps.count() >= kPackedSteps && steps.size.back() <= kPackedTokens;
    const std::vector<Phase> phases = phases_of(steps, gates * H, packed, projected);
    int64_t chunk = 0;
    for (const Phase& phase : phases)
      if (phase.kind == Phase::kInputs) chunk = std::max(chunk, (phase.last - phase.first) * steps.batch);
    size_t scratch_words = 0;
    for (Direction& d : directions) {
      d.units = share_units(d.recurrent, gates, parts);
      d.outputs = projected ? share_units(d.projection, 1, parts) : d.units;
      for (const BsrLinear* a : {&d.input, &d.recurrent, projected ? &d.projection : &d.recurrent})
        scratch_words = std::max(scratch_words, (a->scratch() + 15) / 16 * 16);
      for (size_t part = 0; packed && part + 1 < d.units.size(); part++)
        d.rows.push_back(rows_of_units(d.recurrent, gates, d.units[part], d.units[part + 1]));
    }
    const size_t sums_words = (steps.batch * std::max(gates * H, P) * item + 63) / 64 * 16;
    float* working = nullptr;
    const auto lay_out = [&](Layout memory) {
      for (Direction& d : directions) {
        const auto take = [&](int64_t elements) {
          return reinterpret_cast<char*>(memory.take((elements * item + 3) / 4));
        };
        d.inputs = take(chunk * gates * H);
        for (char*& h : d.h) h = take(steps.batch * P);
        d.hidden = projected ? take(steps.batch * H) : nullptr;
        d.packed.clear();
        for (const std::vector<int32_t>& rows : d.rows) {
          const size_t words = pack(d.recurrent, rows.data(), static_cast<int64_t>(rows.size()), nullptr);
          if (words) d.packed.push_back(memory.take(words));
        }
      }
      working = memory.take(count * parts * (scratch_words + sums_words));
      return memory.used();
    };
    static thread_local Scratch memory;
    lay_out(Layout(memory.at_least(lay_out(Layout(nullptr)))));
    for (Direction& d : directions)
      for (char* h : d.h) std::memcpy(h, d.h_n, steps.batch * P * item);
    std::deque<Parts> threads;
    for (int64_t d = 0; d < count; d++) threads.emplace_back(parts);
    over_directions(count, parts, all_work, [&](int64_t d, int64_t begin, int64_t end) {
      threads[d].run(static_cast<int64_t>(phases.size()), begin, end, [&](int64_t phase, int64_t part) {
        float* own = working + (d * parts + part) * (scratch_words + sums_words);
        run_phase(directions[d], phases[phase], part, parts, own, reinterpret_cast<char*>(own + scratch_words));
      });
    });
  }

  void run_phase(
      const Direction& d, const Phase& phase, int64_t part, int64_t parts, float* scratch, char* sums) const {
    if (phase.kind == Phase::kPack) {
      if (part >= static_cast<int64_t>(d.packed.size())) return;
      const std::vector<int32_t>& rows = d.rows[part];
      pack(d.recurrent, rows.data(), static_cast<int64_t>(rows.size()), d.packed[part]);
      return;
    }
    const int64_t item = bytes_of(dtype);
    const int64_t one = steps.at(phase.first, d.reverse), other = steps.at(phase.last - 1, d.reverse);
    const int64_t low = std::min(one, other), high = std::max(one, other);
    if (phase.kind == Phase::kInputs) {
      BsrLinear a = d.input;
      a.x = static_cast<const char*>(x) + steps.start[low] * a.K * item;
      a.M = steps.start[high] + steps.size[high] - steps.start[low];
      a.y = d.inputs;
      return kernel(a, static_cast<int>(part), static_cast<int>(parts), scratch);
    }
    const int64_t step = steps.at(phase.step, d.reverse), M = steps.size[step], token = steps.start[step];
    char *before = d.h[phase.step % 2], *after = d.h[(phase.step + 1) % 2];
    const bool projected = d.hidden;
    if (phase.kind == Phase::kProject) {
      if (part + 1 >= static_cast<int64_t>(d.outputs.size())) return;
      const int64_t begin = d.outputs[part], end = d.outputs[part + 1];
      if (begin == end) return;
      BsrLinear a = rows_between(d.projection, begin, end);
      a.x = d.hidden;
      a.M = M;
      a.y = sums;
      kernel(a, 0, 1, scratch);
      for (int64_t m = 0; m < M; m++) {
        const char* row = sums + m * a.N * item;
        for (char* to : {after + (m * P + begin) * item, d.h_n + (m * P + begin) * item,
                         d.y + ((token + m) * y_stride() + begin) * item})
          std::memcpy(to, row, a.N * item);
      }
      return;
    }
    if (part + 1 >= static_cast<int64_t>(d.units.size())) return;
    const int64_t begin = d.units[part], end = d.units[part + 1];
    if (begin == end) return;
    CellStep at{&d, token, M, begin, end};
    const bool repacked = !d.packed.empty() && M <= kPackedTokens, whole = repacked || (begin == 0 && end == H);
    at.states = sums + (repacked ? begin * item : 0);
    at.states_stride = whole ? gates * H : end - begin;
    at.states_gate = (whole ? H : M * (end - begin)) * item;
    for (int64_t gate = 0; gate < (whole ? 1 : gates); gate++) {
      BsrLinear a = whole ? d.recurrent : rows_between(d.recurrent, gate * H + begin, gate * H + end);
      a.x = before;
      a.M = M;
      a.y = sums + gate * at.states_gate;
      if (repacked)
        multiply_packed(a, d.packed[part], scratch);
      else
        kernel(a, 0, 1, scratch);
    }
    at.inputs = d.inputs + (token - steps.start[low]) * gates * H * item;
    at.h_before = before;
    at.h = projected ? d.hidden : after;
    at.h_n = projected ? nullptr : d.h_n;
    at.y = projected ? nullptr : d.y + token * y_stride() * item;
    cell(at);
  }
};

}  // namespace recurrent

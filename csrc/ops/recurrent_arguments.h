// What sparse_lstm and sparse_gru take: tensors, the steps of a layer and its matrices, checked.
#pragma once

#include "../cpu/bsr_linear/bsr_linear.h"
#include "common.h"

#include <cstring>

namespace recurrent {

enum Dtype { f32, bf16, i8 };
typedef std::vector<Tensor> Tensors;

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

// Units of a state (D, B, units), of which a layer has rows for each of up to four gates.
inline int64_t units_of(const char* op, const Tensor& state) {
  constexpr int64_t kGates = 4;
  return checked_size(op, "rows of all gates", product(op, {kGates, state.size(2)})) / kGates;
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
      size.assign(x.size(1) == 0 ? 1 : x.size(0), x.size(1));  // without sequences there may be any number of steps
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
      STD_TORCH_CHECK(!batch_sizes || now <= x.size(0) - tokens, op, ": expected batch_sizes that add up to ", x.size(0),
                      ", got more");
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
    BsrLinear a{};
    a.n = checked_side(op, blocks.size(1));
    a.k = checked_side(op, blocks.size(2));
    STD_TORCH_CHECK(K % a.k == 0 && check_pattern(op, rows, columns, blocks.size(0), a.n, a.k, K) == N, op,
                    ": expected matrix ", at, " to be ", N, " x ", K);
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

}  // namespace recurrent

// The checks of the block-sparse projections that ops take as lists of tensors (SparseProjection.tensors() in Python).
#pragma once

#include "../cpu/encoder_layer/encoder_layer.h"
#include "common.h"

typedef std::vector<Tensor> Tensors;

inline bool is_plain(const Tensor& t, ScalarType dtype, int64_t dim) {
  return t.scalar_type() == dtype && t.dim() == dim && t.is_contiguous();
}

inline const float* floats(const char* op, const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(is_plain(t, ScalarType::Float, 1) && t.size(0) == size,
                  op, ": expected ", name, " as contiguous float32 of shape (", size, ")");
  return static_cast<const float*>(t.data_ptr());
}

// The dtype of a projection's values; all projections of a call have that of the first.
inline ScalarType dtype_of(const char* op, const Tensors& projection) {
  STD_TORCH_CHECK(projection.size() > 2, op, ": expected projections as lists of tensors");
  const ScalarType dtype = projection[2].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char,
                  op, ": expected values of float32, bfloat16 or int8");
  return dtype;
}

// N of a projection whose tensors are not checked yet.
inline int64_t rows_of(const char* op, const Tensors& projection) {
  STD_TORCH_CHECK(projection.size() > 2 && projection[0].dim() == 1 && projection[0].size(0) >= 1 && projection[2].dim() == 3,
                  op, ": expected projections with crow_indices and (nnzb, n, k) values");
  return checked_size(op, "N", product(op, {projection[0].size(0) - 1, projection[2].size(1)}));
}

inline Projection projection(const char* op, const char* name, const Tensors& t, ScalarType dtype, int64_t N, int64_t K) {
  const bool quantized = dtype == ScalarType::Char;
  STD_TORCH_CHECK(t.size() == (quantized ? 5 : 4) || (quantized && t.size() == 6), op, ": expected ", name,
                  " as crow_indices, col_indices, values, bias, and with int8 values scales and perhaps row_sums");
  const Tensor &crow = t[0], &col = t[1], &values = t[2];
  STD_TORCH_CHECK(is_plain(crow, ScalarType::Int, 1) && is_plain(col, ScalarType::Int, 1) && is_plain(values, dtype, 3),
                  op, ": expected contiguous int32 indices and (nnzb, n, k) values of one dtype in ", name);
  Projection p{};
  p.n = checked_side(op, values.size(1));
  p.k = checked_side(op, values.size(2));
  STD_TORCH_CHECK(K % p.k == 0 && check_pattern(op, crow, col, values.size(0), p.n, p.k, K) == N, op, ": expected ", name,
                  " of shape (", N, ", ", K, ")");
  STD_TORCH_CHECK(!quantized || p.k % 4 == 0, op, ": expected int8 blocks with k a multiple of 4, got ", p.k);
  STD_TORCH_CHECK(!quantized || K <= kInt8Columns, op, ": expected at most ", kInt8Columns, " columns of int8 in ", name,
                  ", got ", K);
  p.crow = ints(crow);
  p.col = ints(col);
  p.values = values.data_ptr();
  p.bias = floats(op, t[3], N, "a bias");
  p.scales = quantized ? floats(op, t[4], N, "scales") : nullptr;
  if (t.size() == 6) {
    STD_TORCH_CHECK(is_plain(t[5], ScalarType::Int, 1) && t[5].size(0) == N,
                    op, ": expected contiguous int32 row_sums of shape (", N, ")");
    p.row_sums = static_cast<int32_t*>(t[5].data_ptr());
  }
  p.N = N;
  p.K = K;
  return p;
}

inline int64_t stored(const Projection& p) { return int64_t{p.crow[p.N / p.n]} * p.n * p.k; }

// Room for the row sums of int8 projections that came without; false if all have them.
template <size_t count>
bool add_row_sums(Projection* const (&all)[count], std::vector<int32_t>& row_sums) {
  size_t rows = 0;
  for (const Projection* p : all) rows += p->scales && !p->row_sums ? p->N : 0;
  row_sums.resize(rows);
  int32_t* at = row_sums.data();
  bool missing = false;
  for (Projection* p : all)
    if (p->scales && !p->row_sums) p->row_sums = at, at += p->N, missing = true;
  return missing;
}

// What a caller says, before a kernel believes it: sizes whose products cannot overflow, and indices that stay inside.
// Any Python caller reaches the ops, so none of this is left to whoever built a weight.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows and columns of matrices, heads and sides of blocks fit 32 bits, as their indices do.
constexpr int64_t kLargestSize = INT32_MAX;
// More elements than any memory has, and few enough to be counted in bytes, words of scratch or multiply-adds.
constexpr int64_t kMostElements = int64_t{1} << 48;

inline int64_t checked_size(const char* op, const char* name, int64_t size, int64_t least = 0) {
  STD_TORCH_CHECK(least <= size && size <= kLargestSize, op, ": expected ", name, " from ", least, " to ", kLargestSize, ", got ",
                  size);
  return size;
}

inline int checked_side(const char* op, int64_t side) {
  return static_cast<int>(checked_size(op, "sides of blocks", side, 1));
}

// The product of numbers that are not negative.
template <class Sizes>
int64_t product(const char* op, const Sizes& sizes) {
  int64_t result = 1;
  bool fits = true;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    fits = fits && !__builtin_mul_overflow(result, size, &result) && result <= kMostElements;
  }
  STD_TORCH_CHECK(fits, op, ": expected at most ", kMostElements, " elements");
  return result;
}
inline int64_t product(const char* op, std::initializer_list<int64_t> sizes) {
  return product<std::initializer_list<int64_t>>(op, sizes);
}

// All but the last dimension, multiplied.
inline int64_t rows_of(const char* op, const std::vector<int64_t>& sizes) {
  return sizes.empty() ? 1 : product(op, std::vector<int64_t>(sizes.begin(), sizes.end() - 1));
}

// How much there is to do, for threads to share: `count` times `each`, or as much as can be said.
inline int64_t work_of(int64_t count, int64_t each) {
  int64_t work;
  return __builtin_mul_overflow(count, each, &work) ? INT64_MAX : work;
}

inline const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

// The largest index as an unsigned number, which a negative one exceeds; 0 for none.
uint32_t largest_index(const int32_t* index, int64_t count);
// Whether none is negative or less than the one before.
bool never_falls(const int32_t* index, int64_t count);

// Whether all are in [0, end).
inline bool all_below(const int32_t* index, int64_t count, int64_t end) {
  return count == 0 || largest_index(index, count) < end;
}

// Whether row pointers begin with 0, never fall and end with `blocks`.
inline bool are_row_pointers(const int32_t* crow, int64_t rows, int64_t blocks) {
  return crow[0] == 0 && crow[rows] == blocks && never_falls(crow, rows + 1);
}

inline bool is_index(const Tensor& t) {
  return t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_contiguous();
}

// N of a weight (N, K) with `blocks` blocks of n x k, all of whose indices are looked at.
inline int64_t check_pattern(
    const char* op, const Tensor& crow, const Tensor& col, int64_t blocks, int64_t n, int64_t k, int64_t K) {
  STD_TORCH_CHECK(is_index(crow) && is_index(col) && crow.size(0) >= 1, op,
                  ": expected contiguous 1-D int32 crow_indices and col_indices");
  const int64_t rows = crow.size(0) - 1, columns = checked_size(op, "K", K) / k;
  STD_TORCH_CHECK(K % k == 0, op, ": expected K to be a multiple of ", k, ", got ", K);
  STD_TORCH_CHECK(col.size(0) == blocks && ints(crow)[rows] == blocks, op,
                  ": crow_indices, col_indices and values disagree on the number of blocks");
  STD_TORCH_CHECK(are_row_pointers(ints(crow), rows, blocks), op, ": expected crow_indices from 0 to ", blocks,
                  " that never decrease");
  STD_TORCH_CHECK(all_below(ints(col), blocks, columns), op, ": expected col_indices in [0, ", columns, ")");
  return checked_size(op, "N", product(op, {rows, n}));
}

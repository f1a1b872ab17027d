// What the native test drivers share: dtypes, random numbers, memory that shows a kernel's mistakes, and the
// count of failures.
//
// Every array is a heap block of exactly its size, so that AddressSanitizer sees an access beyond it. It
// starts one element past the allocator's alignment, since callers promise the alignment of an element only,
// and all that a kernel must not rely on is filled with NaN.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../../csrc/cpu/isa.h"

enum Dtype { f32, bf16, i8 };

inline const char* dtype_name(Dtype dtype) {
  static const char* const names[] = {"f32", "bf16", "i8"};
  return names[dtype];
}

inline size_t bytes_of(Dtype dtype) { return dtype == f32 ? 4 : dtype == bf16 ? 2 : 1; }

// Relative size of the last bit of a result.
inline double epsilon_of(Dtype dtype) { return dtype == bf16 ? 0x1p-8 : 0x1p-23; }

inline double read_element(const void* data, Dtype dtype, int64_t i) {
  if (dtype == i8) return ((const int8_t*)data)[i];
  if (dtype == f32) return ((const float*)data)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)data)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to the dtype; for bfloat16 by cutting bits off, which is enough to make test data.
inline void write_element(void* data, Dtype dtype, int64_t i, double value) {
  if (dtype == i8) {
    ((int8_t*)data)[i] = (int8_t)value;
  } else if (dtype == f32) {
    ((float*)data)[i] = (float)value;
  } else {
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    ((uint16_t*)data)[i] = (uint16_t)(bits >> 16);
  }
}

// A fixed sequence (splitmix64), so that a failure comes back.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t bound) { return (int64_t)(next() % (uint64_t)bound); }
  double uniform(double low, double high) { return low + (high - low) * (double)(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

inline void* checked(void* memory) {
  if (memory && memory != MAP_FAILED) return memory;
  perror("out of memory");
  exit(2);
}

// `count` elements, of which the first lies one element after an aligned address. No elements: a null
// pointer, as torch gives for an empty tensor.
class Array {
 public:
  Array(Dtype dtype, int64_t count) : dtype_(dtype), count_(count) {
    if (!count) return;
    block_ = (char*)checked(malloc((count + 1) * bytes_of(dtype)));
    poison();
  }
  Array(const Array& other) : Array(other.dtype_, other.count_) {
    if (count_) memcpy(data(), other.data(), count_ * bytes_of(dtype_));
  }
  Array& operator=(const Array&) = delete;
  ~Array() { free(block_); }

  void poison() {
    if (count_) memset(block_, 0xff, (count_ + 1) * bytes_of(dtype_));
  }
  void fill(Random& random, double low, double high) {
    for (int64_t i = 0; i < count_; i++) set(i, random.uniform(low, high));
  }
  void* data() const { return count_ ? block_ + bytes_of(dtype_) : nullptr; }
  int64_t size() const { return count_; }
  double get(int64_t i) const { return read_element(data(), dtype_, i); }
  void set(int64_t i, double value) { write_element(data(), dtype_, i, value); }
  // Whether the element in front of the data is as it was.
  bool front_untouched() const {
    for (size_t i = 0; count_ && i < bytes_of(dtype_); i++)
      if ((uint8_t)block_[i] != 0xff) return false;
    return true;
  }

 private:
  Dtype dtype_;
  int64_t count_;
  char* block_ = nullptr;
};

// 64-byte aligned words, as many as a kernel asks for and no more.
class Scratch {
 public:
  explicit Scratch(size_t words) : bytes_(words * 4) {
    void* memory = nullptr;
    data_ = (float*)checked(posix_memalign(&memory, 64, bytes_) ? nullptr : memory);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { free(data_); }
  float* poisoned() {
    memset(data_, 0xff, bytes_);
    return data_;
  }
  float* untouched() { return data_; }

 private:
  size_t bytes_;
  float* data_;
};

// Zeros that take memory only where they are written.
class Sparse {
 public:
  Sparse(Dtype dtype, int64_t count) : dtype_(dtype), bytes_((count ? count : 1) * bytes_of(dtype)) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = checked(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(data_, bytes_); }
  void* data() const { return data_; }
  double get(int64_t i) const { return read_element(data_, dtype_, i); }
  void set(int64_t i, double value) { write_element(data_, dtype_, i, value); }

 private:
  Dtype dtype_;
  size_t bytes_;
  void* data_;
};

// Prints the first failures and counts them all.
class Failures {
 public:
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    if (++count_ > 20) return;
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
  }
  int64_t count() const { return count_; }

 private:
  int64_t count_ = 0;
};

// How often each kernel of a list ran, and the outcome, which is what main returns.
template <class Entry, size_t size>
int report(const char* op, const char* what, const Entry (&kernels)[size], const Failures& failures) {
  for (const Entry& kernel : kernels)
    if (isa_supported(kernel.isa))
      printf("%-8s %-5s %-12s %8ld calls\n", what, dtype_name(kernel.dtype), isa_name(kernel.isa), (long)kernel.calls);
    else
      printf("%-8s %-5s %-12s not run: this CPU lacks it\n", what, dtype_name(kernel.dtype), isa_name(kernel.isa));
  printf("%s: %s\n", op, failures.count() ? "FAILED" : "all correct");
  return failures.count() != 0;
}

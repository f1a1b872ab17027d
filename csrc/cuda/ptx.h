// The PTX instructions that CUDA C++ has no name for, of compute capability 8.0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Seeded bugs: compiled with -DBUG=n, a kernel is broken in one way, and the tests fail unless they notice.
#ifndef BUG
#define BUG 0
#endif
__device__ constexpr bool bug(int n) { return BUG == n; }

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Start copying kBytes (8 or 16) from global to shared memory, both aligned to kBytes; zeros are written where not
// `inside`, and `from` is then not read. The data is there after cp_async_wait, and for other threads after a barrier.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, bool inside) {
  static_assert(kBytes == 8 || kBytes == 16, "cp.async: 8 or 16 bytes");
  const uint32_t at = shared_address(to);
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of the groups committed last are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += A B for a 2:4 sparse A of 16 x kColumns and a B of kColumns x 8. With g = lane / 4 and t = lane % 4, in bytes:
//   a[0], a[1]   stored bytes 4 t to 4 t + 3 of rows g and g + 8; a[2], a[3] the same 16 bytes further
//   b[i]         bytes 16 i + 4 t to 16 i + 4 t + 3 of column g
//   d[0], d[1]   row g, columns 2 t and 2 t + 1; d[2], d[3] the same of row g + 8
//   e            4 bits for every 4 columns of A: the two positions stored, in order, the first in the lower bits
//                16-bit types, kSelector s: lane t = 2 s + c has columns 16 c to 16 c + 15, of row g in the lower half,
//                of row g + 8 in the upper
//                int8, kSelector 0: lane t has columns 32 (t / 2) to 32 (t / 2) + 31 of row g + 8 (t % 2)
// Metadata whose two positions are not in order is undefined.
// Source: PTX ISA 8.5, "Matrix fragments for multiply-accumulate operation with sparse matrix A".
template <class T>
struct MmaSp;

#define MMA_SP(Type, kColumnsOfType, SumType, name, constraint)                                              \
  template <>                                                                                                \
  struct MmaSp<Type> {                                                                                       \
    using Sum = SumType;                                                                                     \
    static constexpr int kColumns = kColumnsOfType;                                                          \
    template <int kSelector>                                                                                 \
    static __device__ __forceinline__ void run(                                                              \
        Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {                           \
      asm volatile("mma.sp::ordered_metadata.sync.aligned." name                                             \
                   " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"    \
                   : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
                     "r"(e), "n"(kSelector));                                                                \
    }                                                                                                        \
  };
MMA_SP(__half, 32, float, "m16n8k32.row.col.f32.f16.f16.f32", "f")
MMA_SP(__nv_bfloat16, 32, float, "m16n8k32.row.col.f32.bf16.bf16.f32", "f")
MMA_SP(int8_t, 64, int, "m16n8k64.row.col.s32.s8.s8.s32", "r")
#undef MMA_SP

}  // namespace ptx

// Indices beyond 31 bits, without the memory: the arrays are mappings of zeros that take memory where they are
// touched, and of the shares of the work only the last one runs, so that few places are.
//
// Each problem stores ones in the last block row only, in its last blocks. All of grad and x but the last
// token's row is zero, so the last elements of a result are known and an index cut to 32 bits misses them.
#include "bsr_linear_kernels.h"

#include <vector>

namespace {

struct Huge {
  const char* name;
  int64_t M, N, K;
  int n, k;
  int parts;
  int64_t skipped;  // blocks in front of the first one: crow starts there, and so do values and col
};

constexpr int64_t kBlocks = 2;  // stored

struct Weight {
  std::vector<int32_t> crow;
  Sparse col, values, scales;
  int64_t weights;

  Weight(const Huge& h, Dtype dtype)
      : crow(h.N / h.n + 1, (int32_t)h.skipped), col(f32, h.skipped + kBlocks),
        values(dtype, (h.skipped + kBlocks) * h.n * h.k), scales(f32, h.N),
        weights((h.skipped + kBlocks) * h.n * h.k) {
    crow.back() += kBlocks;
    for (int64_t p = 0; p < kBlocks; p++)
      ((int32_t*)col.data())[h.skipped + p] = (int32_t)(h.K / h.k - kBlocks + p);
    for (int64_t i = 0; i < kBlocks * h.n * h.k; i++) values.set(weights - 1 - i, 1);
    for (int64_t j = 0; j < h.n; j++) scales.set(h.N - 1 - j, 1);
  }
};

void expect(const char* name, Dtype dtype, int isa, double got, double expected) {
  if (fabs(got - expected) > 0.01 * expected)
    failures.add("%s %s %s: expected %g, got %g", name, dtype_name(dtype), isa_name(isa), expected, got);
}

// x is one and so is the residual at the end of the last token: y = stored inputs + 1 there.
void forward(const Huge& h, Dtype weights, Dtype io) {
  const Weight weight(h, weights);
  Sparse x(io, h.M * h.K);
  for (int64_t i = 1; i <= kBlocks * h.k; i++) x.set(h.M * h.K - i, 1);
  each(forward_kernels, weights, [&](Entry<BsrLinearKernel>& kernel) {
    Sparse y(io, h.M * h.N);
    for (int64_t j = 1; j <= h.n; j++) y.set(h.M * h.N - j, 1);
    BsrLinear a{};
    a.x = x.data();
    a.crow = weight.crow.data();
    a.col = (const int32_t*)weight.col.data();
    a.values = weight.values.data();
    a.scales = weights == i8 ? (const float*)weight.scales.data() : nullptr;
    a.residual = a.y = y.data();
    a.M = h.M;
    a.N = h.N;
    a.K = h.K;
    a.n = h.n;
    a.k = h.k;
    a.half = io == bf16;
    Scratch scratch(a.scratch());
    kernel.run(a, h.parts - 1, h.parts, scratch.untouched());
    for (int64_t j = 1; j <= h.n; j++)
      expect(h.name, weights, kernel.isa, y.get(h.M * h.N - j), (double)(kBlocks * h.k + 1));
  });
}

void dgrad(const Huge& h, Dtype dtype) {
  const Weight weight(h, dtype);
  Sparse grad(dtype, h.M * h.N);
  for (int64_t j = 1; j <= h.n; j++) grad.set(h.M * h.N - j, 1);
  each(dgrad_kernels, dtype, [&](Entry<BsrLinearGradKernel>& kernel) {
    Sparse dx(dtype, h.M * h.K);
    BsrLinearGrad a{};
    a.grad = grad.data();
    a.values = weight.values.data();
    a.crow = weight.crow.data();
    a.col = (const int32_t*)weight.col.data();
    a.dx = dx.data();
    a.M = h.M;
    a.N = h.N;
    a.K = h.K;
    a.n = h.n;
    a.k = h.k;
    Scratch scratch(a.scratch());
    kernel.run(a, h.parts - 1, h.parts, scratch.untouched());
    for (int64_t i = 1; i <= kBlocks * h.k; i++)
      expect(h.name, dtype, kernel.isa, dx.get(h.M * h.K - i), (double)h.n);
  });
}

// All shares: the blocks of the one block row that has any go to the first.
void wgrad(const Huge& h, Dtype dtype) {
  const Weight weight(h, dtype);
  Sparse grad(dtype, h.M * h.N), x(dtype, h.M * h.K);
  for (int64_t j = 1; j <= h.n; j++) grad.set(h.M * h.N - j, 2);
  for (int64_t i = 1; i <= kBlocks * h.k; i++) x.set(h.M * h.K - i, 1);
  each(wgrad_kernels, dtype, [&](Entry<BsrLinearGradKernel>& kernel) {
    Sparse dvalues(f32, weight.weights);
    BsrLinearGrad a{};
    a.grad = grad.data();
    a.x = x.data();
    a.crow = weight.crow.data();
    a.col = (const int32_t*)weight.col.data();
    a.dvalues = (float*)dvalues.data();
    a.M = h.M;
    a.N = h.N;
    a.K = h.K;
    a.n = h.n;
    a.k = h.k;
    Scratch scratch(a.scratch());
    kernel.run(a, 0, 1, scratch.untouched());
    for (int64_t i = 1; i <= kBlocks * h.n * h.k; i++)
      expect(h.name, dtype, kernel.isa, dvalues.get(weight.weights - i), 2);
  });
}

}  // namespace

int main() {
  const int64_t million = 1 << 20, half = (int64_t)1 << 31;
  const Huge forwards[] = {
      {"y, many tokens", 2100, million, 8, 8, 4, 2000, 0},
      {"y, few tokens", 8, half / 8 + 64, 8, 64, 4, 100000, 0},
      {"x, many tokens", 33000, 16, 66304, 16, 4, 100, 0},
      {"values, many tokens", 20, 32, 64, 32, 32, 1, half / 1024},
      {"values, few tokens", 3, 32, 64, 32, 32, 1, half / 1024},
  };
  for (const Huge& h : forwards) {
    forward(h, f32, f32);
    forward(h, bf16, bf16);
    forward(h, i8, f32);
    forward(h, i8, bf16);
  }
  for (Dtype dtype : {f32, bf16}) {
    for (const Huge& h : {Huge{"dx", 33000, 16, 66304, 16, 4, 1032, 0}, Huge{"grad of dx", 2100, million, 8, 8, 4, 66, 0},
                          Huge{"values of dx", 20, 32, 64, 32, 32, 1, half / 1024}})
      dgrad(h, dtype);
    for (const Huge& h : {Huge{"x of dvalues", 33000, 16, 66304, 16, 16, 1, 0}, Huge{"grad of dvalues", 2100, million, 8, 8, 4, 1, 0},
                          Huge{"dvalues", 20, 32, 64, 32, 32, 1, half / 1024}})
      wgrad(h, dtype);
  }
  return verdict("bsr_linear_huge");
}

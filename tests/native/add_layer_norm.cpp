// Every kernel of add_layer_norm that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/add_layer_norm/add_layer_norm.h"

#include <vector>

#include "layer_norm.h"

#define FORWARD(isa, dtype, suffix) AddLayerNormKernel add_layer_norm_##dtype##_##suffix;
#include "../../csrc/cpu/add_layer_norm/add_layer_norm.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  AddLayerNormKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, add_layer_norm_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/add_layer_norm/add_layer_norm.inc"
};

Failures failures;

void run(Dtype dtype, int64_t M, int64_t H, bool with_residual, bool with_bias, double offset, int parts, Random& random) {
  Array x(dtype, M * H), residual(dtype, M * H), weight(dtype, H), bias(dtype, H);
  x.fill(random, offset - 2, offset + 2);
  residual.fill(random, -1, 1);
  weight.fill(random, 0.5, 1.5);
  bias.fill(random, -1, 1);
  for (Entry& kernel : kernels) {
    if (kernel.dtype != dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    Array y(dtype, M * H);
    AddLayerNorm a{};
    a.x = x.data();
    a.residual = with_residual ? residual.data() : nullptr;
    a.weight = weight.data();
    a.bias = with_bias ? bias.data() : nullptr;
    a.y = y.data();
    a.M = M;
    a.H = H;
    a.eps = 1e-5f;
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    if (!y.front_untouched()) failures.add("wrote in front of the result");
    for (int64_t m = 0; m < M; m++) {
      Row row(H);
      row.add(x, m);
      if (with_residual) row.add(residual, m);
      const int64_t wrong = first_wrong(row, weight, with_bias ? &bias : nullptr, 1e-5f, y, m, dtype);
      if (wrong < 0) continue;
      failures.add("add_layer_norm %s %s M=%ld H=%ld residual=%d bias=%d offset=%g parts=%d: wrong at [%ld][%ld], %.9g",
                   dtype_name(dtype), isa_name(kernel.isa), (long)M, (long)H, with_residual, with_bias, offset, parts,
                   (long)m, (long)wrong, y.get(m * H + wrong));
      break;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  std::vector<int64_t> Hs = {768, 1000};
  for (int64_t H = 1; H <= (quick ? 70 : 200); H++) Hs.push_back(H);
  for (Dtype dtype : {f32, bf16})
    for (int64_t H : Hs)
      for (int64_t M : {1, 2, 5})
        for (double offset : {0.0, 1000.0}) {
          const int parts[] = {1, 2, 3, 7};
          run(dtype, M, H, random.below(2), random.below(2), offset, parts[random.below(4)], random);
        }
  return report("add_layer_norm", "forward", kernels, failures);
}

#include "kernels.h"

void bsr_linear_neon(const BsrLinear& a, int part, int parts, float* scratch) { bsr_linear(a, part, parts, scratch); }

void bsr_linear_wgrad_neon(const BsrLinearWgrad& a, int part, int parts, float* scratch) {
  bsr_linear_wgrad(a, part, parts, scratch);
}

#include "kernels.h"

void bsr_linear_scalar(const BsrLinear& a, int part, int parts, float* scratch) { bsr_linear(a, part, parts, scratch); }

void bsr_linear_wgrad_scalar(const BsrLinearWgrad& a, int part, int parts, float* scratch) {
  bsr_linear_wgrad(a, part, parts, scratch);
}

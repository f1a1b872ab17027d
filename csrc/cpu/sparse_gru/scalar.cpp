#include "kernels.h"

SNLP_SPARSE_GRU(f32_scalar, float)
SNLP_SPARSE_GRU(bf16_scalar, bf16)

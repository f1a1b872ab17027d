#include "kernels.h"

SNLP_SPARSE_GRU(f32_neon, float)
SNLP_SPARSE_GRU(bf16_neon, bf16)

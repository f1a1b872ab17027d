#include "kernels.h"

SNLP_SPARSE_GRU(f32_avx2, float)
SNLP_SPARSE_GRU(bf16_avx2, bf16)

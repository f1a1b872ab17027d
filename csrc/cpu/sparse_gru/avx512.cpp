#include "kernels.h"

SNLP_SPARSE_GRU(f32_avx512, float)
SNLP_SPARSE_GRU(bf16_avx512, bf16)

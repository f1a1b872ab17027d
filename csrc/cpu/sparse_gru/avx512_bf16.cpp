#include "kernels.h"

SNLP_SPARSE_GRU(bf16_avx512_bf16, bf16)

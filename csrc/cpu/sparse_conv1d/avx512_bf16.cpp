#include "kernels.h"

SNLP_FORWARD(bf16_avx512_bf16, forward_bfloat)

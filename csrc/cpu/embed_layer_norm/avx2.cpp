#include "kernels.h"

SNLP_FORWARD(f32_avx2, float)
SNLP_FORWARD(bf16_avx2, bf16)

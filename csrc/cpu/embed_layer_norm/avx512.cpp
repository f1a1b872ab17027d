#include "kernels.h"

SNLP_FORWARD(f32_avx512, float)
SNLP_FORWARD(bf16_avx512, bf16)

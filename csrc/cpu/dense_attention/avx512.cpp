#include "kernels.h"

SNLP_FORWARD(f32_avx512, F32, F32)
SNLP_FORWARD(bf16_avx512, Bf16Wide, F32)

#include "kernels.h"

SNLP_FORWARD(f32_avx2, F32, F32)
SNLP_FORWARD(bf16_avx2, Bf16Wide, F32)
SNLP_BACKWARD(f32_avx2, F32)
SNLP_BACKWARD(bf16_avx2, Bf16Wide)

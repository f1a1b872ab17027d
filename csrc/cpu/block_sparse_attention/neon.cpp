#include "kernels.h"

SNLP_FORWARD(f32_neon, F32, F32)
SNLP_FORWARD(bf16_neon, Bf16Wide, F32)
SNLP_BACKWARD(f32_neon, F32)
SNLP_BACKWARD(bf16_neon, Bf16Wide)

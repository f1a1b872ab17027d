#include "kernels.h"

SNLP_FORWARD(f32_neon, float)
SNLP_FORWARD(bf16_neon, bf16)

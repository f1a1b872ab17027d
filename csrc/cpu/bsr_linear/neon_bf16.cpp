#include "kernels.h"

SNLP_FORWARD(bf16_neon_bf16, forward_bf16_dot)
SNLP_PACKED(bf16_neon_bf16, Bf16Dot, Bf16Dot)

#include "kernels.h"

SNLP_FORWARD(f32_scalar, float)
SNLP_FORWARD(bf16_scalar, bf16)

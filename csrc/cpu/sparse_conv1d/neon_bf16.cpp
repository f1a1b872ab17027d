#include "kernels.h"

SNLP_FORWARD(bf16_neon_bf16, forward_bfloat)

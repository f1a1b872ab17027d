#include "kernels.h"

SNLP_FORWARD(f32_neon, forward<F32>)
SNLP_FORWARD(bf16_neon, forward_bfloat)
SNLP_FORWARD(i8_neon, forward_int8<I8Wide>)

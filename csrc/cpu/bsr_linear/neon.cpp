#include "kernels.h"

SNLP_FORWARD(f32_neon, forward<F32>)
SNLP_FORWARD(bf16_neon, forward<Bf16Wide>)
SNLP_FORWARD(i8_neon, forward_i8<I8Wide>)
SNLP_GRAD(f32_neon, float)
SNLP_GRAD(bf16_neon, bf16)

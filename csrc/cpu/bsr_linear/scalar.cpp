#include "kernels.h"

SNLP_FORWARD(f32_scalar, forward<F32>)
SNLP_FORWARD(bf16_scalar, forward<Bf16Wide>)
SNLP_FORWARD(i8_scalar, forward_i8<I8Wide>)
SNLP_GRAD(f32_scalar, float)
SNLP_GRAD(bf16_scalar, bf16)

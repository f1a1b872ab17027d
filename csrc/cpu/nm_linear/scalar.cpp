#include "kernels.h"

SNLP_FORWARD(f32_scalar, forward<F32>)
SNLP_FORWARD(bf16_scalar, forward<Bf16Wide>)

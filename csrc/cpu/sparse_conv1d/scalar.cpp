#include "kernels.h"

SNLP_FORWARD(f32_scalar, forward<F32>)
SNLP_FORWARD(bf16_scalar, forward_bfloat)
SNLP_FORWARD(i8_scalar, forward_int8<I8Wide>)

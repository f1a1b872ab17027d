#include "kernels.h"

SNLP_FORWARD(f32_scalar, F32, F32)
SNLP_FORWARD(bf16_scalar, Bf16Wide, F32)
SNLP_BACKWARD(f32_scalar, F32)
SNLP_BACKWARD(bf16_scalar, Bf16Wide)

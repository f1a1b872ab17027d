#include "kernels.h"

SNLP_FORWARD(f32_scalar, forward<F32>)
SNLP_FORWARD(bf16_scalar, forward<Bf16Wide>)
SNLP_FORWARD(i8_scalar, forward_i8<I8Wide>)
SNLP_PACKED(f32_scalar, F32, F32)
SNLP_PACKED(bf16_scalar, Bf16Wide, Bf16Wide)
SNLP_PACKED(i8_scalar, I8Wide<float>, I8Wide<bf16>)
SNLP_GRAD(f32_scalar, float)
SNLP_GRAD(bf16_scalar, bf16)

#include "kernels.h"

SNLP_FORWARD(f32_neon, forward<F32>)
SNLP_FORWARD(bf16_neon, forward<Bf16Wide>)
SNLP_FORWARD(i8_neon, forward_i8<I8Wide>)
SNLP_PACKED(f32_neon, F32, F32)
SNLP_PACKED(bf16_neon, Bf16Wide, Bf16Wide)
SNLP_PACKED(i8_neon, I8Wide<float>, I8Wide<bf16>)
SNLP_GRAD(f32_neon, float)
SNLP_GRAD(bf16_neon, bf16)

#include "kernels.h"

SNLP_FORWARD(f32_avx2, forward<F32>)
SNLP_FORWARD(bf16_avx2, forward<Bf16Wide>)
SNLP_FORWARD(i8_avx2, forward_i8<I8Madd>)
SNLP_PACKED(f32_avx2, F32, F32)
SNLP_PACKED(bf16_avx2, Bf16Wide, Bf16Wide)
SNLP_PACKED(i8_avx2, I8Madd<float>, I8Madd<bf16>)
SNLP_GRAD(f32_avx2, float)
SNLP_GRAD(bf16_avx2, bf16)

#include "kernels.h"

SNLP_FORWARD(f32_avx2, forward<F32>)
SNLP_FORWARD(bf16_avx2, forward<Bf16Wide>)
SNLP_FORWARD(i8_avx2, forward_i8<I8Madd>)
SNLP_GRAD(f32_avx2, float)
SNLP_GRAD(bf16_avx2, bf16)

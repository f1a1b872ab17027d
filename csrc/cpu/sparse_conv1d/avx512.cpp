#include "kernels.h"

SNLP_FORWARD(f32_avx512, forward<F32>)
SNLP_FORWARD(bf16_avx512, forward_bfloat)
SNLP_FORWARD(i8_avx512, forward_int8<I8Madd>)

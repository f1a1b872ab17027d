#include "kernels.h"

SNLP_FORWARD(f32_avx2, forward<F32>)
SNLP_FORWARD(bf16_avx2, forward_bfloat)
SNLP_FORWARD(i8_avx2, forward_int8<I8Madd>)

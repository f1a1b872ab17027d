#include "kernels.h"

SNLP_FORWARD(f32_avx2, forward<F32>)
SNLP_FORWARD(bf16_avx2, forward<Bf16Wide>)

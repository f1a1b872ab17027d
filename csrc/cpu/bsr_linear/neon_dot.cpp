#include "kernels.h"

SNLP_FORWARD(i8_neon_dot, forward_i8<I8Dot>)
SNLP_PACKED(i8_neon_dot, I8Dot<float>, I8Dot<bf16>)

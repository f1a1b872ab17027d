#include "kernels.h"

SNLP_FORWARD(i8_neon_dot, forward<I8Dot<float>>)

#include "kernels.h"

SNLP_FORWARD(i8_neon_dot, forward_i8<I8Dot>)

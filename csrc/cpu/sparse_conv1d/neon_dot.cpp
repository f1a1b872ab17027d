#include "kernels.h"

SNLP_FORWARD(i8_neon_dot, forward_int8<I8Dot>)

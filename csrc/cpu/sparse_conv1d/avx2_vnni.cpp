#include "kernels.h"

SNLP_FORWARD(i8_avx2_vnni, forward_int8<I8Dot>)

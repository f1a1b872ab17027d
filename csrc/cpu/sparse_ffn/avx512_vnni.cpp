#include "kernels.h"

SNLP_FORWARD(i8_avx512_vnni, forward<I8Dot<float>>)

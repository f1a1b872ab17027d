#include "kernels.h"

SNLP_FORWARD(i8_avx2_vnni, forward<I8Dot<float>>)

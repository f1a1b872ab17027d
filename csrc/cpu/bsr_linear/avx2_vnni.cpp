#include "kernels.h"

SNLP_FORWARD(i8_avx2_vnni, forward_i8<I8Dot>)
SNLP_PACKED(i8_avx2_vnni, I8Dot<float>, I8Dot<bf16>)

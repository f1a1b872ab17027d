#include "kernels.h"

SNLP_ENCODER_LAYER(bf16_avx512_bf16, encoder_layer_bfloat)
SNLP_ENCODER_LAYER(i8_avx512_bf16, encoder_layer_int8<I8Dot>)

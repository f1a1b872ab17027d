#include "kernels.h"

SNLP_ENCODER_LAYER(f32_avx512, encoder_layer<F32, F32>)
SNLP_ENCODER_LAYER(bf16_avx512, encoder_layer_bfloat)
SNLP_ENCODER_LAYER(i8_avx512, encoder_layer_int8<I8Madd>)
SNLP_ENCODER_ROWS(avx512)

#include "kernels.h"

SNLP_ENCODER_LAYER(f32_scalar, encoder_layer<F32, F32>)
SNLP_ENCODER_LAYER(bf16_scalar, encoder_layer_bfloat)
SNLP_ENCODER_LAYER(i8_scalar, encoder_layer_int8<I8Wide>)
SNLP_ENCODER_ROWS(scalar)

#include "kernels.h"

SNLP_ENCODER_LAYER(i8_neon_dot, encoder_layer_int8<I8Dot>)

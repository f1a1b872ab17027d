#include "kernels.h"

SNLP_ENCODER_LAYER(i8_avx2_vnni, encoder_layer_int8<I8Dot>)

#include "kernels.h"

SNLP_DECODER_LAYERS(f32_scalar, float)
SNLP_DECODER_LAYERS(bf16_scalar, bf16)

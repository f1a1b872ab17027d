#include "kernels.h"

SNLP_DECODER_LAYERS(f32_neon, float)
SNLP_DECODER_LAYERS(bf16_neon, bf16)

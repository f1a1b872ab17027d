#include "kernels.h"

SNLP_DECODER_LAYERS(f32_avx512, float)
SNLP_DECODER_LAYERS(bf16_avx512, bf16)

#include "kernels.h"

SNLP_DECODER_LAYERS(f32_avx2, float)
SNLP_DECODER_LAYERS(bf16_avx2, bf16)

#include "kernels.h"

SNLP_SPARSE_LSTM(f32_neon, float)
SNLP_SPARSE_LSTM(bf16_neon, bf16)

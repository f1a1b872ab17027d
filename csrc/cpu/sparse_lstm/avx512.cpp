#include "kernels.h"

SNLP_SPARSE_LSTM(f32_avx512, float)
SNLP_SPARSE_LSTM(bf16_avx512, bf16)

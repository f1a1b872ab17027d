#include "kernels.h"

SNLP_SPARSE_LSTM(f32_avx2, float)
SNLP_SPARSE_LSTM(bf16_avx2, bf16)

#include "kernels.h"

SNLP_SPARSE_LSTM(f32_scalar, float)
SNLP_SPARSE_LSTM(bf16_scalar, bf16)

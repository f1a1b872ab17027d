#include "kernels.h"

SNLP_SPARSE_LSTM(bf16_avx512_bf16, bf16)

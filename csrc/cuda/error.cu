#include "export.h"

const char* sparsenlp_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// What the library shows to Python: functions of C that take raw pointers, sizes and a stream, and return a code.
#pragma once

#include <stdint.h>

#define SPARSENLP_EXPORT extern "C" __attribute__((visibility("default")))

// The words for a code; "no error" for 0.
SPARSENLP_EXPORT const char* sparsenlp_cuda_error(int code);

// What a launcher launches; tests execute it in an interpreter.
struct CudaLaunch {
  const char* kernel;
  int64_t blocks;
  int threads;
  int shared_bytes;  // allocated at the launch
};

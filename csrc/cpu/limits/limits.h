// What the machine can do at best, for judging the kernels: a loop of nothing but independent FMAs.
#pragma once

#include <stdint.h>

// Runs `rounds` rounds on registers only and returns the floating-point operations done.
typedef int64_t FmaPeakKernel(int64_t rounds);

// The activations in double precision.
#pragma once

#include <math.h>

#include "../../csrc/cpu/activation.h"

inline double activated(double x, int activation) {
  switch (activation) {
    case kRelu: return x < 0 ? 0 : x;
    case kGelu: return 0.5 * x * (1 + erf(x * M_SQRT1_2));
    case kGeluTanh: return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default: return x;
  }
}

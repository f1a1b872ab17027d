// The activations that ops can fuse; names as in Python's `activation` argument.
#pragma once

#include <string.h>

enum Activation : int { kNone, kRelu, kGelu, kGeluTanh, kActivationCount };

// -1 for an unknown name.
inline int activation_code(const char* name) {
  static const char* const names[] = {"none", "relu", "gelu", "gelu_tanh"};
  for (int code = 0; code < kActivationCount; code++)
    if (!strcmp(name, names[code])) return code;
  return -1;
}

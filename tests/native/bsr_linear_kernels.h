// The kernels of bsr_linear, from the list that the library itself chooses from: a kernel that is listed
// cannot go untested where it can run.
#pragma once

#include "../../csrc/cpu/bsr_linear/bsr_linear.h"
#include "../../csrc/cpu/isa.h"
#include "check.h"

#define FORWARD(isa, dtype, suffix) BsrLinearKernel bsr_linear_##dtype##_##suffix;
#define GRAD(isa, dtype, suffix) BsrLinearGradKernel bsr_linear_dgrad_##dtype##_##suffix, bsr_linear_wgrad_##dtype##_##suffix;
#include "../../csrc/cpu/bsr_linear/bsr_linear.inc"

namespace {

template <class Kernel>
struct Entry {
  int isa;
  Dtype dtype;
  Kernel* run;
  int64_t calls;  // how often a test took it
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, bsr_linear_##dtype##_##suffix, 0},
Entry<BsrLinearKernel> forward_kernels[] = {
#include "../../csrc/cpu/bsr_linear/bsr_linear.inc"
};
#define GRAD(isa, dtype, suffix) {isa, dtype, bsr_linear_dgrad_##dtype##_##suffix, 0},
Entry<BsrLinearGradKernel> dgrad_kernels[] = {
#include "../../csrc/cpu/bsr_linear/bsr_linear.inc"
};
#define GRAD(isa, dtype, suffix) {isa, dtype, bsr_linear_wgrad_##dtype##_##suffix, 0},
Entry<BsrLinearGradKernel> wgrad_kernels[] = {
#include "../../csrc/cpu/bsr_linear/bsr_linear.inc"
};

Failures failures;

// f(kernel) for those of a dtype that this CPU runs.
template <class AnyEntry, size_t count, class F>
void each(AnyEntry (&kernels)[count], Dtype dtype, F f) {
  for (AnyEntry& kernel : kernels) {
    if (kernel.dtype != dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    f(kernel);
  }
}

template <class AnyEntry, size_t count>
void print_calls(const char* name, const AnyEntry (&kernels)[count]) {
  for (const AnyEntry& kernel : kernels)
    if (isa_supported(kernel.isa))
      printf("%-8s %-5s %-12s %8ld calls\n", name, dtype_name(kernel.dtype), isa_name(kernel.isa), (long)kernel.calls);
    else
      printf("%-8s %-5s %-12s not run: this CPU lacks it\n", name, dtype_name(kernel.dtype), isa_name(kernel.isa));
}

// A line per kernel and the verdict, which is also the exit status of the program.
int verdict(const char* program) {
  print_calls("forward", forward_kernels);
  print_calls("dgrad", dgrad_kernels);
  print_calls("wgrad", wgrad_kernels);
  printf("%s: %s\n", program, failures.count() ? "FAILED" : "all correct");
  return failures.count() != 0;
}

}  // namespace

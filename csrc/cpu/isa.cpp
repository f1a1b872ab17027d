#include "isa.h"

#include <atomic>

static std::atomic<int> cap{kIsaCount - 1};

int isa_in_use() {
  static const int best = [] {
    int isa = kIsaCount - 1;
    while (!isa_supported(isa)) isa--;
    return isa;
  }();
  int isa = cap.load(std::memory_order_relaxed);
  if (isa >= best) return best;
  while (!isa_supported(isa)) isa--;
  return isa;
}

void set_isa_cap(int isa) { cap.store(isa, std::memory_order_relaxed); }

// Threads that keep their share of the work through many phases, and with it what they have in cache.
#pragma once

#include "common.h"

#include <sched.h>

#include <algorithm>

// The threads of one direction. A part stays with one thread, which keeps its weights in that core's cache. Where
// another process has the core, a thread that waits does the missing part: any number of threads, one included, gets
// through.
class Parts {
 public:
  explicit Parts(int64_t count) : parts_(count) {}
  int64_t count() const { return static_cast<int64_t>(parts_.size()); }

  // All phases, as the thread of the parts [begin, end).
  template <class Work>
  void run(int64_t phases, int64_t begin, int64_t end, const Work& work) {
    for (int64_t phase = 0; phase < phases; phase++) {
      take(phase, begin, end, work);
      constexpr int kSpins = 4000;
      for (int spins = 0; !done(phase); spins++) {
        if (spins < kSpins) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
          continue;
        }
        spins = 0;
        if (!take(phase, 0, count(), work)) sched_yield();
      }
    }
  }

 private:
  // How many phases of a part were taken, and done. Apart, also from the line that a core prefetches with its
  // neighbour: `taken` is the own thread's until another one has waited long, `done` is what the others look at.
  struct Part {
    alignas(128) std::atomic<int64_t> taken{0};
    alignas(128) std::atomic<int64_t> done{0};
  };

  bool done(int64_t phase) const {
    for (const Part& part : parts_)
      if (part.done.load(std::memory_order_acquire) <= phase) return false;
    return true;
  }

  template <class Work>
  bool take(int64_t phase, int64_t begin, int64_t end, const Work& work) {
    bool any = false;
    for (int64_t part = begin; part < end; part++) {
      int64_t expected = phase;
      if (!parts_[part].taken.compare_exchange_strong(expected, phase + 1, std::memory_order_acq_rel)) continue;
      work(phase, part);
      parts_[part].done.store(phase + 1, std::memory_order_release);
      any = true;
    }
    return any;
  }

  std::vector<Part> parts_;
};

constexpr int64_t kWorkPerThread = 1 << 15;  // multiply-adds below which a second thread costs more than it saves

// Threads for each direction: at most as many as there are, and none for less work than a thread is worth.
inline int64_t parts_of(int64_t directions, int64_t work) {
  const int64_t threads = was_forked() ? 1 : torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads / directions, work / kWorkPerThread));
}

// run(direction, begin, end) for all parts of all directions, on this thread alone if there is little work in all.
template <class Run>
void over_directions(int64_t directions, int64_t parts, int64_t work, const Run& run) {
  const auto share = [&](int64_t begin, int64_t end) {
    for (int64_t d = 0; d < directions; d++) {
      const int64_t first = std::max(begin - d * parts, int64_t{0}), last = std::min(end - d * parts, parts);
      if (first < last) run(d, first, last);
    }
  };
  const int64_t all = directions * parts;
  const bool alone = all == 1 || was_forked() || torch::stable::get_num_threads() == 1;
  if (alone || work < all * kWorkPerThread) return share(0, all);
  torch::stable::parallel_for(0, all, 1, share);
}

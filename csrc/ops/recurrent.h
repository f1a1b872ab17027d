// What sparse_lstm and sparse_gru share: the order of a layer's steps over threads.
//
// A direction is a list of phases, which its parts finish one after another: the projection of the inputs of as many
// steps as fit the cache, then these steps one by one. In both a part computes all gates of its own units, so that it
// reads the same rows of the weights at each step and no sums but its own, and one barrier a step is enough. Directions
// do not meet.
//
// What a part writes in each step lies apart from what other parts write, or a core would prefetch, and so take away,
// lines that another one is writing. Parts see each other's outputs in `sent`, and copy them to a state of their own.
#pragma once

#include "parts.h"
#include "recurrent_arguments.h"

#include <deque>

#define FORWARD(isa, dtype, suffix)                       \
  BsrLinearKernel bsr_linear_##dtype##_##suffix;          \
  BsrLinearPackKernel bsr_linear_pack_##dtype##_##suffix; \
  BsrLinearPackedKernel bsr_linear_packed_##dtype##_##suffix;
#include "../cpu/bsr_linear/bsr_linear.inc"

namespace recurrent {

inline BsrLinearKernel* linear_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_##type##_##suffix},
  const Listed<BsrLinearKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

inline BsrLinearPackKernel* pack_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_pack_##type##_##suffix},
  const Listed<BsrLinearPackKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

inline BsrLinearPackedKernel* packed_kernel(Dtype dtype) {
#define FORWARD(isa, type, suffix) {type == dtype ? isa : kIsaCount, bsr_linear_packed_##type##_##suffix},
  const Listed<BsrLinearPackedKernel> list[] = {
#include "../cpu/bsr_linear/bsr_linear.inc"
  };
  return best_kernel(list);
}

inline int64_t stored(const BsrLinear& a) { return int64_t{a.crow[a.N / a.n]} * a.n * a.k; }

// Rows [begin, end) of a matrix as a matrix of its own; both are multiples of n, or the end. `item`: bytes of a bias.
inline BsrLinear rows_between(BsrLinear a, int64_t begin, int64_t end, int64_t item) {
  a.crow += begin / a.n;
  if (a.scales) a.scales += begin;
  if (a.bias) a.bias = static_cast<const char*>(a.bias) + begin * item;
  a.N = end - begin;
  return a;
}

// Bounds of `parts` shares of the units of a matrix with `gates` rows for each, H apart, of about equal work. One
// share if a block has rows of two gates.
inline std::vector<int64_t> share_units(const BsrLinear& a, int64_t gates, int64_t parts) {
  constexpr int64_t kUnitWork = 32;  // of the functions of one gate, in stored weights
  const int64_t H = a.N / gates;
  if (H % a.n) parts = 1;
  std::vector<int64_t> bounds(1, 0);
  const auto work_before = [&](int64_t unit) {
    int64_t blocks = 0;
    for (int64_t gate = 0; gate < gates; gate++) blocks += a.crow[(gate * H + unit) / a.n] - a.crow[gate * H / a.n];
    return blocks * a.n * a.k + unit * gates * kUnitWork;
  };
  const int64_t step = (15 + a.n) / a.n * a.n, all = parts > 1 ? work_before(H) : 0;
  for (int64_t part = 1, unit = 0; part < parts; part++) {
    while (unit < H && work_before(unit) * parts < all * part) unit = std::min(unit + step, H);
    bounds.push_back(unit);
  }
  bounds.push_back(H);
  return bounds;
}

// The block rows of the units [begin, end) in every gate, the shortest first.
inline std::vector<int32_t> rows_of_units(const BsrLinear& a, int64_t gates, int64_t begin, int64_t end) {
  const int64_t H = a.N / gates;
  std::vector<int32_t> rows;
  for (int64_t gate = 0; gate < gates; gate++)
    for (int64_t row = (gate * H + begin) / a.n; row * a.n < gate * H + end; row++)
      if (rows.empty() || rows.back() < row) rows.push_back(static_cast<int32_t>(row));  // may have rows of two gates
  const auto length = [&](int32_t row) { return a.crow[row + 1] - a.crow[row]; };
  std::stable_sort(rows.begin(), rows.end(), [&](int32_t one, int32_t other) { return length(one) < length(other); });
  return rows;
}

// The recurrent weights are packed, or the inputs of the steps [first, last) projected, or one of these steps done;
// steps count in the direction's order.
struct Phase {
  enum Kind { kPack, kInputs, kCells, kProject } kind;
  int64_t first, last, step;
};

// The phases of `steps` for inputs that are `columns` words wide.
inline std::vector<Phase> phases_of(const Steps& steps, int64_t columns, bool packed, bool projected) {
  constexpr int64_t kWords = 1 << 16, kTokens = 32;  // of inputs that are projected at a time; at least these tokens
  const int64_t most = std::max(kTokens, kWords / std::max<int64_t>(columns, 1));
  const int64_t chunk = std::max<int64_t>(1, most / std::max<int64_t>(steps.batch, 1));
  std::vector<Phase> phases;
  if (packed) phases.push_back({Phase::kPack, 0, 0, 0});
  for (int64_t first = 0; first < steps.count(); first += chunk) {
    const int64_t last = std::min(first + chunk, steps.count());
    phases.push_back({Phase::kInputs, first, last, first});
    for (int64_t step = first; step < last; step++) {
      phases.push_back({Phase::kCells, first, last, step});
      if (projected) phases.push_back({Phase::kProject, first, last, step});
    }
  }
  return phases;
}

// One direction of the forward pass.
struct Direction {
  BsrLinear input, recurrent, projection;  // N of the projection is 0 where there is none
  bool reverse;
  std::vector<int64_t> units, outputs;  // bounds of the parts
  std::vector<std::vector<int32_t>> rows;  // of the recurrent weights, of each part, where they are packed
  std::vector<float*> packed;
  char* inputs;     // of each part, the sums of its units for the tokens of a chunk
  char* hidden;     // B x H, before the projection
  char* y;          // its columns of y
  char* h_n;        // B x P: before the first step, and after the last
};

// The memory of one part.
struct Own {
  float* scratch;
  char* sums;     // of a step: of all gates, or of the projection
  char* h;        // B x P: all of the state that the next step meets
  char* sent[2];  // B x its outputs: after even and odd steps, for the other parts
  float* cells;   // B x units, for the cell to keep
};

// Sums of all gates of some units: those of gate g and row m begin at data + g * gate bytes, m * stride elements.
struct GateSums {
  char* data;
  int64_t gate, stride;
};

// What a cell has to do: the units [begin, end) of the sequences of one step.
struct CellStep {
  const Direction* direction;
  int64_t token, M, begin, end;
  int64_t ended;  // the sequences from here on take no further step: they leave their states in h_n
  bool first;     // of this part
  GateSums inputs, states;
  float* cells;        // B x (end - begin), to keep
  void *h, *h_n, *y;  // h_n and y are null where h is projected first
};

constexpr int64_t kPackedSteps = 4;  // from which on packing saves more time than it takes
constexpr int64_t kMostGates = 4;
constexpr int64_t kThreadBytes = 1 << 19;  // of weights read in all steps, for which a thread is worth waking
constexpr size_t kApart = 1024;  // words between what two parts write: a page, beyond which no core prefetches

// All steps of all directions. `cell` does a CellStep.
template <class Cell>
struct Forward {
  const Steps& steps;
  std::vector<Direction>& directions;
  const void* x;
  Dtype dtype, weights;
  int64_t gates, H, P;
  const Cell& cell;
  BsrLinearKernel* kernel = linear_kernel(weights);
  BsrLinearPackKernel* pack = pack_kernel(weights);
  BsrLinearPackedKernel* multiply_packed = packed_kernel(weights);

  int64_t y_stride() const { return static_cast<int64_t>(directions.size()) * P; }

  void run() {
    const Direction& first = directions[0];
    const int64_t item = bytes_of(dtype), count = static_cast<int64_t>(directions.size());
    const bool projected = first.projection.N > 0;
    const int64_t step_work = steps.batch * (stored(first.recurrent) + first.recurrent.N);
    const int64_t all_work = count * steps.tokens * (stored(first.recurrent) + stored(first.input) + first.recurrent.N);
    const int64_t most = std::max<int64_t>(1, all_work * bytes_of(weights) / kThreadBytes);
    const int64_t parts = std::min(parts_of(count, step_work), most);
    const bool packed = steps.count() >= kPackedSteps && steps.size.back() <= kPackedTokens;
    const std::vector<Phase> phases = phases_of(steps, gates * H, packed, projected);
    int64_t chunk = 0;
    for (const Phase& phase : phases)
      if (phase.kind == Phase::kInputs) chunk = std::max(chunk, (phase.last - phase.first) * steps.batch);
    size_t scratch_words = 0;
    for (Direction& d : directions) {
      d.units = share_units(d.recurrent, gates, parts);
      d.outputs = projected ? share_units(d.projection, 1, parts) : d.units;
      for (const BsrLinear* a : {&d.input, &d.recurrent, projected ? &d.projection : &d.recurrent})
        scratch_words = std::max(scratch_words, a->scratch());
      for (size_t part = 0; packed && part + 1 < d.units.size(); part++)
        d.rows.push_back(rows_of_units(d.recurrent, gates, d.units[part], d.units[part + 1]));
    }
    std::vector<Own> own(count * parts);
    const auto lay_out = [&](Layout memory) {
      const auto take = [&](int64_t elements) {
        return reinterpret_cast<char*>(memory.take((elements * item + 3) / 4));
      };
      for (Own& part : own) {
        part.scratch = memory.take(scratch_words);
        part.sums = take(steps.batch * std::max(gates * H, P));
        part.h = take(steps.batch * P);
        part.cells = memory.take(steps.batch * H);
        for (char*& sent : part.sent) sent = take(steps.batch * P);
        memory.take(kApart);
      }
      for (Direction& d : directions) {
        d.inputs = take(chunk * gates * H);
        d.hidden = projected ? take(steps.batch * H) : nullptr;
        d.packed.clear();
        for (const std::vector<int32_t>& rows : d.rows) {
          const size_t words = pack(d.recurrent, rows.data(), static_cast<int64_t>(rows.size()), nullptr);
          if (words) d.packed.push_back(memory.take(words));
        }
      }
      return memory.used();
    };
    static thread_local Scratch memory;
    lay_out(Layout(memory.at_least(lay_out(Layout(nullptr)))));
    for (size_t i = 0; i < own.size(); i++) std::memcpy(own[i].h, directions[i / parts].h_n, steps.batch * P * item);
    std::deque<Parts> threads;
    for (int64_t d = 0; d < count; d++) threads.emplace_back(parts);
    over_directions(count, parts, all_work, [&](int64_t d, int64_t begin, int64_t end) {
      threads[d].run(static_cast<int64_t>(phases.size()), begin, end, [&](int64_t phase, int64_t part) {
        run_phase(directions[d], phases[phase], part, &own[d * parts]);
      });
    });
  }

  // `all`: the memory of the parts of this direction.
  void run_phase(const Direction& d, const Phase& phase, int64_t part, const Own* all) const {
    const Own& own = all[part];
    if (phase.kind == Phase::kPack) {
      if (part >= static_cast<int64_t>(d.packed.size())) return;
      const std::vector<int32_t>& rows = d.rows[part];
      pack(d.recurrent, rows.data(), static_cast<int64_t>(rows.size()), d.packed[part]);
      return;
    }
    const int64_t item = bytes_of(dtype);
    const int64_t step = steps.at(phase.step, d.reverse), M = steps.size[step], token = steps.start[step];
    const bool last = phase.step + 1 == steps.count();
    const int64_t ended = last ? 0 : std::min(M, steps.size[steps.at(phase.step + 1, d.reverse)]);
    const bool projected = d.hidden;
    if (phase.kind == Phase::kProject) {
      if (part + 1 >= static_cast<int64_t>(d.outputs.size())) return;
      const int64_t begin = d.outputs[part], end = d.outputs[part + 1];
      if (begin == end) return;
      BsrLinear a = rows_between(d.projection, begin, end, item);
      a.x = d.hidden;
      a.M = M;
      a.y = own.sums;
      kernel(a, 0, 1, own.scratch);
      for (int64_t m = 0; m < M; m++) {
        const char* row = own.sums + m * a.N * item;
        std::memcpy(own.h + (m * P + begin) * item, row, a.N * item);
        std::memcpy(d.y + ((token + m) * y_stride() + begin) * item, row, a.N * item);
        if (m >= ended) std::memcpy(d.h_n + (m * P + begin) * item, row, a.N * item);
      }
      return send(d, phase, part, own, M);
    }
    if (part + 1 >= static_cast<int64_t>(d.units.size())) return;
    const int64_t begin = d.units[part], end = d.units[part + 1];
    if (begin == end) return;
    const int64_t one = steps.at(phase.first, d.reverse), other = steps.at(phase.last - 1, d.reverse);
    const int64_t low = std::min(one, other), high = std::max(one, other);
    const int64_t tokens = steps.start[high] + steps.size[high] - steps.start[low];
    CellStep at{&d, token, M, begin, end, ended, phase.step == 0};
    at.inputs = sums_at(d.inputs + tokens * gates * begin * item, tokens, begin, end);
    if (phase.kind == Phase::kInputs)
      return multiply(
          d.input, static_cast<const char*>(x) + steps.start[low] * d.input.K * item, tokens, begin, end, at.inputs,
          own.scratch);
    receive(d, phase, part, all, M);
    at.inputs.data += (token - steps.start[low]) * at.inputs.stride * item;
    if (!d.packed.empty() && M <= kPackedTokens) {
      BsrLinear a = d.recurrent;
      a.x = own.h;
      a.M = M;
      a.y = own.sums;
      multiply_packed(a, d.packed[part], own.scratch);
      at.states = {own.sums + begin * item, H * item, gates * H};
    } else {
      at.states = sums_at(own.sums, M, begin, end);
      multiply(d.recurrent, own.h, M, begin, end, at.states, own.scratch);
    }
    at.cells = own.cells;
    at.h = projected ? d.hidden : own.h;
    at.h_n = projected ? nullptr : d.h_n;
    at.y = projected ? nullptr : d.y + token * y_stride() * item;
    cell(at);
    if (!projected) send(d, phase, part, own, M);
  }

  // This part's outputs, to where the others find them in the next step.
  void send(const Direction& d, const Phase& phase, int64_t part, const Own& own, int64_t M) const {
    if (d.outputs.size() == 2) return;
    const int64_t item = bytes_of(dtype), begin = d.outputs[part], size = (d.outputs[part + 1] - begin) * item;
    for (int64_t m = 0; m < M; m++)
      std::memcpy(own.sent[phase.step % 2] + m * size, own.h + (m * P + begin) * item, size);
  }

  // The outputs of the other parts in the step before, into this part's state.
  void receive(const Direction& d, const Phase& phase, int64_t part, const Own* all, int64_t M) const {
    if (phase.step == 0) return;
    const int64_t item = bytes_of(dtype), known = std::min(M, steps.size[steps.at(phase.step - 1, d.reverse)]);
    for (int64_t other = 0; other + 1 < static_cast<int64_t>(d.outputs.size()); other++) {
      if (other == part) continue;
      const int64_t begin = d.outputs[other], size = (d.outputs[other + 1] - begin) * item;
      for (int64_t m = 0; m < known; m++)
        std::memcpy(all[part].h + (m * P + begin) * item, all[other].sent[(phase.step - 1) % 2] + m * size, size);
    }
  }

  // The sums that `multiply` writes to `data`: all rows of the matrix side by side, or gate after gate.
  GateSums sums_at(char* data, int64_t M, int64_t begin, int64_t end) const {
    const int64_t units = end - begin, item = bytes_of(dtype);
    return units == H ? GateSums{data, H * item, gates * H} : GateSums{data, M * units * item, units};
  }

  // The units [begin, end) of every gate for M rows of x.
  void multiply(
      const BsrLinear& matrix, const void* rows, int64_t M, int64_t begin, int64_t end, const GateSums& to,
      float* scratch) const {
    const int64_t count = end - begin == H ? 1 : gates;
    BsrLinear slices[kMostGates];
    for (int64_t gate = 0; gate < count; gate++) {
      BsrLinear& a = slices[gate];
      a = count == 1 ? matrix : rows_between(matrix, gate * H + begin, gate * H + end, bytes_of(dtype));
      a.x = rows;
      a.M = M;
      a.y = to.data + gate * to.gate;
      a.next = gate + 1 < count ? &slices[gate + 1] : nullptr;
    }
    kernel(slices[0], 0, 1, scratch);
  }
};

}  // namespace recurrent

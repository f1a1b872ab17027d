// fingerprint: a number that changes with a few elements of each of many tensors. What tensors and which elements is told
// once (watch), so that looking at them again takes a few microseconds, whatever their number.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "common.h"

namespace {

struct Watched {
  Tensor tensor;
  const char* data;  // of the tensor, when it was told
  size_t size;       // bytes of an element that are looked at
  std::vector<int64_t> offsets;
};
typedef std::vector<Watched> Watch;

std::mutex lock;
std::map<int32_t, std::shared_ptr<const Watch>> watches;
int32_t latest = 0;

// One past the last element that the tensor reaches, counted from its first.
int64_t extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < t.dim(); dim++) {
    if (t.size(dim) == 0) return 0;
    last += (t.size(dim) - 1) * t.stride(dim);
  }
  return last + 1;
}

int32_t number_of(const Tensor& watch) {
  STD_TORCH_CHECK(watch.scalar_type() == ScalarType::Int && watch.numel() == 1, "fingerprint: expected the number of a watch");
  return *ints(watch);
}

Tensor watch_elements(std::vector<Tensor> tensors, const Tensor& places) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(places.is_cpu() && places.scalar_type() == ScalarType::Long && places.dim() == 2 && places.is_contiguous() &&
                      places.size(0) == count,
                  "fingerprint: expected contiguous int64 places with a row for each of ", count, " tensors");
  const int64_t* place = static_cast<const int64_t*>(places.data_ptr());
  auto watch = std::make_shared<Watch>();
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_cpu(), "fingerprint: expected tensors on the CPU");
    const size_t size = static_cast<size_t>(t.element_size());
    const int64_t end = extent(t);
    Watched watched{t, static_cast<const char*>(t.data_ptr()), size < 8 ? size : 8, {}};
    for (int64_t i = 0; i < places.size(1); i++, place++) {
      STD_TORCH_CHECK(*place < end, "fingerprint: expected places within ", end, " elements, got ", *place);
      if (*place >= 0) watched.offsets.push_back(*place * static_cast<int64_t>(size));
    }
    watch->push_back(std::move(watched));
  }
  Tensor number = empty({1}, ScalarType::Int);
  std::lock_guard<std::mutex> guard(lock);
  watches[++latest] = std::move(watch);
  *static_cast<int32_t*>(number.data_ptr()) = latest;
  return number;
}

int64_t fingerprint(const Tensor& number) {
  std::shared_ptr<const Watch> watch;
  {
    std::lock_guard<std::mutex> guard(lock);
    const auto found = watches.find(number_of(number));
    STD_TORCH_CHECK(found != watches.end(), "fingerprint: expected the number of a watch");
    watch = found->second;
  }
  uint64_t hash = 0;
  for (const Watched& watched : *watch) {
    const bool moved = watched.tensor.data_ptr() != watched.data;
    if (moved) hash++;
    for (int64_t offset : watched.offsets) {
      uint64_t bits = 0;
      if (!moved) std::memcpy(&bits, watched.data + offset, watched.size);
      hash = (hash ^ bits) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
  }
  return static_cast<int64_t>(hash);
}

void unwatch(const Tensor& number) {
  std::lock_guard<std::mutex> guard(lock);
  watches.erase(number_of(number));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsenlp, CPU, m) {
  m.impl("watch", TORCH_BOX(&watch_elements));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("unwatch", TORCH_BOX(&unwatch));
}

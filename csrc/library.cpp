// What Python calls: the list of instruction sets, and the two passes of each.
#include <cstring>
#include <vector>

#include "interface.h"

namespace {

using fastdpop::Kernels;

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &fastdpop::kAVX512BF16,
    &fastdpop::kAVX512,
    &fastdpop::kAVX2,
#endif
    &fastdpop::kGeneric,
};
constexpr int32_t kCount = sizeof(kAll) / sizeof(kAll[0]);

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Number of instruction sets compiled in, best first.
EXPORT int32_t fastdpop_count() { return kCount; }

EXPORT const char* fastdpop_name(int32_t index) { return kAll[index]->name; }

EXPORT bool fastdpop_supported(int32_t index) { return kAll[index]->supported(); }

// Whether there are threads.
EXPORT bool fastdpop_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

EXPORT int64_t fastdpop_panel(int32_t index) { return kAll[index]->panel; }

EXPORT int64_t fastdpop_tile(int32_t index) { return kAll[index]->tile; }

// Size of Problem, by which Python checks that it lays the structure out alike.
EXPORT int64_t fastdpop_problem_size() { return sizeof(fastdpop::Problem); }

// Finds rows that are the same, bit for bit: `first` gets the index of every row that repeats no
// earlier one, `which` the position in `first` of every row. Returns the number of distinct rows.
EXPORT int64_t fastdpop_distinct(int64_t rows, int64_t row_bytes, const void* hidden,
                                 const int64_t* targets, int64_t* first, int64_t* which) {
  const char* data = static_cast<const char*>(hidden);
  int64_t slots = 1, count = 0;
  while (slots < 2 * rows) slots *= 2;
  std::vector<int64_t> table(size_t(slots), -1);
  for (int64_t row = 0; row < rows; row++) {
    const char* own = data + row * row_bytes;
    uint64_t hash = uint64_t(targets[row]) * 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i + 2 <= row_bytes; i += 2) {
      uint16_t part;
      std::memcpy(&part, own + i, 2);
      hash = (hash ^ part) * 0x100000001b3u;
    }
    int64_t slot = int64_t((hash ^ hash >> 32) & uint64_t(slots - 1));
    for (;; slot = (slot + 1) & (slots - 1)) {
      if (table[size_t(slot)] < 0) {
        table[size_t(slot)] = count;
        first[count] = row;
        which[row] = count++;
        break;
      }
      const int64_t other = first[table[size_t(slot)]];
      if (targets[other] == targets[row] &&
          std::memcmp(data + other * row_bytes, own, size_t(row_bytes)) == 0) {
        which[row] = table[size_t(slot)];
        break;
      }
    }
  }
  return count;
}

EXPORT void fastdpop_forward(int32_t index, const fastdpop::Problem* problem) {
  kAll[index]->forward(*problem);
}

EXPORT void fastdpop_backward(int32_t index, const fastdpop::Problem* problem) {
  kAll[index]->backward(*problem);
}
}

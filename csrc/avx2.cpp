// The kernels for avx2; chosen at run time.
#if defined(__x86_64__)
#include "before.h"
#pragma GCC target("avx2,fma,f16c")
#define LANES 8
#define MR 6  // rows of a product's register block
#include "kernels.inl"

namespace fastdpop {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
}  // namespace
extern const Kernels kAVX2 = {"avx2", supported, ROWS, TILE, forward, backward};
}  // namespace fastdpop
#endif

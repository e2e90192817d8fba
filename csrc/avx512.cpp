// The kernels for avx512f; chosen at run time.
#if defined(__x86_64__)
#include "before.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LANES 16
#define MR 12  // rows of a product's register block
#include "kernels.inl"

namespace fastdpop {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace
extern const Kernels kAVX512 = {"avx512", supported, ROWS, TILE, forward, backward};
}  // namespace fastdpop
#endif

// The kernels for AVX-512 with bfloat16 dot products; chosen at run time.
#if defined(__x86_64__)
#include "before.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define LANES 16
#define HAS_PAIRS  // products of pairs of bfloat16
#define MR 12      // rows of a product's register block
#include "kernels.inl"

namespace fastdpop {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}
}  // namespace
extern const Kernels kAVX512BF16 = {"avx512bf16", supported, ROWS, TILE, forward, backward};
}  // namespace fastdpop
#endif

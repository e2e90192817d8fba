// What the kernels include, before `#pragma GCC target`: inline functions of the standard library
// must not be compiled for an instruction set, since the linker keeps one copy of each for the
// whole library.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "interface.h"

#if defined(__GLIBC__) && defined(__x86_64__)
// glibc 2.29 brought a `log` that differs from the one before in how it sets errno, nothing else.
// With that one the library loads on every glibc that torch does.
__asm__(".symver log,log@GLIBC_2.2.5");
#endif

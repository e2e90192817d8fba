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

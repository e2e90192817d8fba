// The kernels for any processor; chosen at run time.
#include "before.h"
#define LANES 4
#define MR 4  // rows of a product's register block
#include "kernels.inl"

namespace fastdpop {
namespace {
bool supported() { return true; }
}  // namespace
extern const Kernels kGeneric = {"generic", supported, ROWS, TILE, forward, backward};
}  // namespace fastdpop

// The kernels, written once with the compiler's vector types and compiled once for each instruction
// set.
//
// Rows are lanes. A panel is ROWS rows; their hidden states are packed as (width, ROWS), so that
// one step of a matrix product takes a vector of rows and a number broadcast from the weights, in
// the order in which the weights lie in memory: they are never repacked. The logits of a tile of
// tokens, (tile, ROWS), stay in the first-level cache while the softmax goes over them lane by
// lane, without a horizontal operation.
//
//   logits     Z = W_tile . H           a: W rows          b: hidden (width, ROWS)
//   dlogp_dhidden  D += W_tile^T . P    a: W columns       b: P = exp(Z - m) (tile, ROWS)
//   dWeight    dW_tile += G . hidden    a: G (tile, rows)  b: hidden (rows, ROWS columns)
//
// All three are `product` below. With bfloat16 dot products a step takes a pair of neighbours in
// the inner dimension, as 32 bits.

namespace fastdpop {
namespace {

constexpr int64_t VECTORS = 2;             // vectors of a panel
constexpr int64_t ROWS = VECTORS * LANES;  // rows of a panel
constexpr int64_t TILE = 192;  // tokens of a vocabulary tile: even, and a multiple of every MR
constexpr int64_t BLOCK = 8;   // panels that share a pass over the weights
constexpr int64_t BACKWARD_BLOCK = 16;  // panels whose gradients go into one product
constexpr int64_t SLICES = 8;           // parts of the vocabulary, merged in order

#include "numbers.inl"
#include "product.inl"
#include "softmax.inl"
#include "forward.inl"
#include "backward.inl"

void forward(const Problem& p) {
  if (kHasPairs && p.compute_dtype == kBFloat16) return forward_as<kHasPairs>(p);
  forward_as<false>(p);
}

void backward(const Problem& p) {
  if (kHasPairs && p.compute_dtype == kBFloat16) return backward_as<kHasPairs>(p);
  backward_as<false>(p);
}

}  // namespace
}  // namespace fastdpop

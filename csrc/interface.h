// The interface between Python and the kernels, and between the kernels and their instruction sets:
// plain C structures, so that one binary serves every version of torch. fastdpop/engines/cpu.py
// mirrors `Problem` field by field.
#pragma once
#include <cstdint>

namespace fastdpop {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One call: `rows` hidden states through one head. Every pointer is to contiguous memory, `weight`
// apart, whose rows may be apart. Outputs are null where not wanted.
struct Problem {
  int64_t rows, vocabulary, width;
  const void* hidden;  // (rows, width) of `dtype`
  const void* weight;  // (vocabulary, width) of `weight_dtype`, rows `weight_stride` elements apart
  int64_t weight_stride;
  const float* bias;       // (vocabulary) or null
  const int64_t* targets;  // (rows)
  int32_t dtype;           // of hidden
  int32_t weight_dtype;    // of weight
  int32_t compute_dtype;   // to which they are rounded before they are multiplied
  int32_t softcap;         // whether the head has one
  float scale;             // logits = scale * raw, or, with softcap,
  float cap_in, cap_out;   // logits = cap_out * tanh(cap_in * raw)
  int32_t threads;
  int64_t scratch_bytes;  // the most that running slices side by side may take

  // forward
  float* logps;           // (rows)
  float* lse;             // (rows); an input of the backward pass
  float* entropy;         // (rows)
  float* mean_logits;     // (rows)
  float* token_accuracy;  // (rows)
  float* aligned_logps;   // (rows)
  float* max_logit;       // (rows)
  float* dlogp_dhidden;   // (rows, width): d logp / d hidden
  uint16_t* kept;         // exp(z - kept_max) in float16, (tiles, panels, tile, panel rows)
  float* kept_max;        // (tiles, panels * panel rows)
  // dlogp_dhidden is for panels whose first row is in [dhidden_from, dhidden_to) alone. `again`:
  // only that is, from what an earlier call kept, and only where dlogp is not all 0.
  int64_t dhidden_from, dhidden_to;
  int32_t again;

  // backward
  int32_t fresh;       // the gradients hold nothing yet and are overwritten, else added to
  const float* dlogp;  // (rows)
  float* dweight;      // (vocabulary, width)
  float* dbias;        // (vocabulary)
};

// What one instruction set provides.
struct Kernels {
  const char* name;
  bool (*supported)();
  int64_t panel;  // rows that go through together, one a lane
  int64_t tile;   // tokens of a vocabulary tile
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
};

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAVX2, kAVX512, kAVX512BF16;
#endif

}  // namespace fastdpop

// From raw logits of a tile to a running softmax.

// Raw logits of a tile to the model's logits, in place.
inline void transform(const Problem& p, int64_t first, int64_t count, float* z) {
  if (!p.bias && !p.softcap && p.scale == 1.0f) return;
  for (int64_t v = 0; v < count; v++) {
    const float bias = p.bias ? p.bias[first + v] : 0.0f;
    for (int64_t j = 0; j < VECTORS; j++) {
      float* at = z + v * ROWS + j * LANES;
      const vf raw = load(at) + bias;
      store(at, p.softcap ? p.cap_out * tangent(p.cap_in * raw) : p.scale * raw);
    }
  }
}

// d logits / d raw logits.
inline vf slope(const Problem& p, vf z) {
  if (!p.softcap) return all(p.scale);
  const vf t = z * (1.0f / p.cap_out);
  return (1.0f - t * t) * (p.cap_in * p.cap_out);
}

// Running softmax of one vector of rows. `max` may lag behind the largest logit seen: sums are
// rescaled only when they would grow by more than exp(STEP), which spares most passes over the
// dlogp_dhidden.
constexpr float STEP = 8.0f;

struct Running {
  vf max, sum, error, largest, weighted, total, squares;
};

inline void reset(Running& r) {
  r.max = r.largest = all(std::numeric_limits<float>::lowest());
  r.sum = r.error = r.weighted = r.total = r.squares = vf{};
}

// sum += x with compensation, so that the error does not grow with the vocabulary.
inline void add_exactly(Running& r, vf x) {
  const vf y = x - r.error;
  const vf t = r.sum + y;
  r.error = (t - r.sum) - y;
  r.sum = t;
}

inline bool any(vi mask) {
  int32_t found = 0;
  for (int64_t i = 0; i < LANES; i++) found |= mask[i];
  return found != 0;
}

// Moves the reference maximum to cover a tile. Returns whether sums, and `factor`, changed.
inline bool rebase(Running& r, vf tile_max, vf& factor) {
  r.largest = larger(tile_max, r.largest);
  const vi far = tile_max > r.max + STEP;
  factor = all(1.0f);
  if (!any(far)) return false;
  const vf next = select(far, tile_max, r.max);
  const vf shift = r.max - next;
  factor = exponential(larger(shift, all(-1e4f)));
  r.weighted = factor * (r.weighted + select(r.sum > 0.0f, shift * r.sum, vf{}));
  r.sum *= factor;
  r.error *= factor;
  r.squares *= factor * factor;
  r.max = next;
  return true;
}

// A panel's numbers as float16. They are read again only after the whole vocabulary has gone by:
// past the caches, where possible.
inline void keep(uint16_t* to, const vf* x) {
#if LANES == 16
  const __m256i low = _mm512_cvtps_ph(reinterpret_cast<__m512>(x[0]), _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(reinterpret_cast<__m512>(x[1]), _MM_FROUND_TO_NEAREST_INT);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                      _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#elif LANES == 8
  for (int j = 0; j < VECTORS; j++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * LANES),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(x[j]), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < ROWS; i++) to[i] = round_f16(x[i / LANES][i % LANES]);
#endif
}

inline vf load_f16(const uint16_t* from) {
#if LANES == 16
  return reinterpret_cast<vf>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif LANES == 8
  return reinterpret_cast<vf>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  vf x;
  for (int64_t i = 0; i < LANES; i++) x[i] = widen_f16(from[i]);
  return x;
#endif
}

#if defined(HAS_PAIRS)
inline __m256i to_bf16(vf x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
}

// bfloat16 of `even` in the low halves, of `odd` in the high ones.
inline vu interleave(vf even, vf odd) {
  const vu low = reinterpret_cast<vu>(_mm512_cvtepu16_epi32(to_bf16(even)));
  const vu high = reinterpret_cast<vu>(_mm512_cvtepu16_epi32(to_bf16(odd)));
  return low | high << 16;
}

inline void store_bf16(uint32_t* to, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x));
}
#else
inline vu interleave(vf, vf) { return vu{}; }
inline void store_bf16(uint32_t*, vf) {}
#endif

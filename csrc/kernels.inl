// The kernels, written once with the compiler's vector types and compiled once for each instruction set.
//
// Rows are lanes. A panel is ROWS rows; their hidden states are packed as (width, ROWS), so that one step of a matrix product takes a
// vector of rows and a number broadcast from the weights, in the order in which the weights lie in memory: they are never repacked.
// The logits of a tile of tokens, (tile, ROWS), stay in the first-level cache while the softmax goes over them lane by lane, without
// a horizontal operation.
//
//   logits     Z = W_tile . H                 a: W rows            b: hidden (width, ROWS)
//   direction  D += W_tile^T . P              a: W columns         b: P = exp(Z - m) (tile, ROWS)
//   dWeight    dW_tile += G . hidden          a: G (tile, rows)    b: hidden (rows, columns of a panel's width)
//
// All three are `product` below. With bfloat16 dot products a step takes a pair of neighbours in the inner dimension, as 32 bits.

namespace fastdpop {
namespace {

constexpr int64_t VECTORS = 2;              // vectors of a panel
constexpr int64_t ROWS = VECTORS * LANES;   // rows of a panel
constexpr int64_t TILE = 192;               // tokens of a vocabulary tile: even, and a multiple of every MR
constexpr int64_t BLOCK = 8;                // panels that share a pass over the weights
constexpr int64_t SLICES = 8;               // parts of the vocabulary, merged in order

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4)));

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
inline vf all(float x) { return vf{} + x; }
inline vf select(vi mask, vf yes, vf no) { return reinterpret_cast<vf>((mask & reinterpret_cast<vi>(yes)) | (~mask & reinterpret_cast<vi>(no))); }
inline vf larger(vf a, vf b) { return select(a > b, a, b); }

// ---- numbers ------------------------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t x) { float f; std::memcpy(&f, &x, 4); return f; }
inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }

inline float widen_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

inline uint16_t round_bf16(float x) {  // to nearest even; without branches, so that loops over it are vectorised
  const uint32_t u = bits(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

inline float widen_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  // The exponent's offset is applied by a multiplication, which also normalises subnormals.
  const uint32_t finite = bits(from_bits(magnitude << 13) * from_bits(0x77800000u));
  return from_bits(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : finite));
}

inline uint16_t round_f16(float x) {
  const uint32_t u = bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the addition round
    return uint16_t(sign | (bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// exp(x) to 1e-7, 0 below -87, NaN kept; x <= 88.
inline vf exponential(vf x) {
  const vi low = x < -87.0f;
  vf t = select(low, all(-87.0f), x) * 1.44269504f;
  const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = t + magic;
  const vf f = t - (shifted - magic);
  vf p = all(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const vi power = (reinterpret_cast<vi>(shifted) - 0x4b400000) << 23;
  return select(low, all(0.0f), reinterpret_cast<vf>(reinterpret_cast<vi>(p) + power));
}

inline vf tangent(vf x) {  // tanh
  const vf a = reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff);
  const vf z = x * x;
  vf small = all(-5.70498872745e-3f);
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * x + x;
  const vf e = exponential(select(a > 20.0f, all(40.0f), a + a));
  const vf large = 1.0f - 2.0f / (e + 1.0f);
  const vi sign = reinterpret_cast<vi>(x) & int32_t(0x80000000);
  return select(a < 0.625f, small, reinterpret_cast<vf>(reinterpret_cast<vi>(large) | sign));
}

// ---- the product --------------------------------------------------------------------------------------------------------------

#if defined(HAS_PAIRS)
constexpr bool kHasPairs = true;
inline vf multiply_add_pairs(vf sum, vu a, vu b) {
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#else
constexpr bool kHasPairs = false;
inline vf multiply_add_pairs(vf sum, vu, vu) { return sum; }
#endif

// c (M, ROWS) (+)= a (M, depth) . b (depth, ROWS). Elements of a and b are floats, or pairs of bfloat16 in the inner dimension.
template <bool PAIRS, int M>
inline void product_of(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, float* c, int64_t c_row, bool add) {
  vf sum[M][VECTORS];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < VECTORS; j++) sum[m][j] = add ? load(c + m * c_row + j * LANES) : vf{};
  for (int64_t k = 0; k < depth; k++, a += a_step, b += ROWS) {
    vu right[VECTORS];
    for (int j = 0; j < VECTORS; j++) right[j] = *reinterpret_cast<const vu*>(b + j * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const vu left = vu{} + a[m * a_row];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++)
        sum[m][j] = PAIRS ? multiply_add_pairs(sum[m][j], left, right[j])
                          : reinterpret_cast<vf>(left) * reinterpret_cast<vf>(right[j]) + sum[m][j];
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < VECTORS; j++) store(c + m * c_row + j * LANES, sum[m][j]);
}

template <bool PAIRS, int M>
inline void product_rest(int64_t rows, int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, float* c, int64_t c_row, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return product_of<PAIRS, M>(depth, a, a_row, a_step, b, c, c_row, add);
    product_rest<PAIRS, M - 1>(rows, depth, a, a_row, a_step, b, c, c_row, add);
  }
}

template <bool PAIRS>
void product(int64_t rows, int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, float* c, int64_t c_row, bool add) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) product_of<PAIRS, MR>(depth, a + m * a_row, a_row, a_step, b, c + m * c_row, c_row, add);
  product_rest<PAIRS, MR - 1>(rows - m, depth, a + m * a_row, a_row, a_step, b, c + m * c_row, c_row, add);
}

// ---- memory -------------------------------------------------------------------------------------------------------------------

// Cache-line aligned scratch of one thread.
class Scratch {
 public:
  explicit Scratch(int64_t words) : memory_(static_cast<uint32_t*>(std::aligned_alloc(64, size_t(words * 4 + 63) / 64 * 64 + 64))) {}
  uint32_t* get() { return memory_.get(); }
  float* floats() { return reinterpret_cast<float*>(memory_.get()); }

 private:
  struct Free { void operator()(uint32_t* p) const { std::free(p); } };
  std::unique_ptr<uint32_t, Free> memory_;
};

inline float element(const void* data, int64_t i, int32_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t x = static_cast<const uint16_t*>(data)[i];
  return dtype == kBFloat16 ? widen_bf16(x) : widen_f16(x);
}

// Hidden states, or weights, as they enter the products: rounded to the compute dtype.
struct Operand {
  const void* data;
  int32_t dtype, compute_dtype;

  float value(int64_t i) const {
    const float x = element(data, i, dtype);
    if (compute_dtype == dtype || compute_dtype == kFloat32) return x;
    return compute_dtype == kBFloat16 ? widen_bf16(round_bf16(x)) : widen_f16(round_f16(x));
  }
  uint16_t bf16(int64_t i) const {
    return dtype == kBFloat16 ? static_cast<const uint16_t*>(data)[i] : round_bf16(element(data, i, dtype));
  }
};

inline Operand hidden_of(const Problem& p) { return {p.hidden, p.dtype, p.compute_dtype}; }
inline Operand weight_of(const Problem& p) { return {p.weight, p.weight_dtype, p.compute_dtype}; }

// Words of `count` numbers in the inner dimension.
template <bool PAIRS>
constexpr int64_t words(int64_t count) { return PAIRS ? (count + 1) / 2 : count; }

// One row as words, in which pairs of bfloat16 are simply neighbours; 0 past the end.
template <bool PAIRS>
void convert_row(Operand of, int64_t start, int64_t width, uint32_t* out) {
  if (PAIRS) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    if (of.dtype == kBFloat16) {
      std::memcpy(to, static_cast<const uint16_t*>(of.data) + start, size_t(width) * 2);
    } else if (of.dtype == kFloat32) {
      const float* from = static_cast<const float*>(of.data) + start;
      for (int64_t i = 0; i < width; i++) to[i] = round_bf16(from[i]);
    } else {
      for (int64_t i = 0; i < width; i++) to[i] = of.bf16(start + i);
    }
    if (width % 2) to[width] = 0;
    return;
  }
  float* to = reinterpret_cast<float*>(out);
  if (of.dtype == kFloat32 && of.compute_dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(of.data) + start, size_t(width) * 4);
  } else if (of.dtype == kBFloat16 && of.compute_dtype != kFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(of.data) + start;
    for (int64_t i = 0; i < width; i++) to[i] = widen_bf16(from[i]);
  } else if (of.dtype == kFloat32 && of.compute_dtype == kBFloat16) {
    const float* from = static_cast<const float*>(of.data) + start;
    for (int64_t i = 0; i < width; i++) to[i] = widen_bf16(round_bf16(from[i]));
  } else if (of.dtype == kFloat16 && of.compute_dtype != kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(of.data) + start;
    for (int64_t i = 0; i < width; i++) to[i] = widen_f16(from[i]);
  } else {
    for (int64_t i = 0; i < width; i++) to[i] = of.value(start + i);
  }
}

// Hidden states of a panel as (words of width, ROWS); lanes past the last row are 0.
template <bool PAIRS>
void pack_rows(const Problem& p, int64_t first, uint32_t* out) {
  const int64_t depth = words<PAIRS>(p.width);
  Scratch row(depth);
  for (int64_t r = 0; r < ROWS; r++) {
    if (first + r < p.rows) convert_row<PAIRS>(hidden_of(p), (first + r) * p.width, p.width, row.get());
    else std::fill(row.get(), row.get() + depth, 0u);
    for (int64_t k = 0; k < depth; k++) out[k * ROWS + r] = row.get()[k];
  }
}

// ROWS columns of all hidden states as (words of rows, columns); columns and rows past the end are 0.
template <bool PAIRS>
void pack_columns(const Problem& p, int64_t first, int64_t depth, uint32_t* out) {
  const Operand hidden = hidden_of(p);
  for (int64_t k = 0; k < depth; k++)
    for (int64_t j = 0; j < ROWS; j++) {
      const int64_t column = first + j, row = PAIRS ? 2 * k : k;
      uint32_t value = 0;
      if (column < p.width && row < p.rows) {
        value = PAIRS ? hidden.bf16(row * p.width + column) : bits(hidden.value(row * p.width + column));
        if (PAIRS && row + 1 < p.rows) value |= uint32_t(hidden.bf16((row + 1) * p.width + column)) << 16;
      }
      out[k * ROWS + j] = value;
    }
}

// A tile of weights as rows of words: the weights themselves where they lie that way already, else a copy.
struct Tile {
  const uint32_t* data;
  int64_t stride;
};

template <bool PAIRS>
Tile weight_rows(const Problem& p, int64_t first, int64_t count, uint32_t* copy) {
  const int64_t depth = words<PAIRS>(p.width);
  const bool direct = PAIRS ? p.weight_dtype == kBFloat16 && p.width % 2 == 0 && p.weight_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 4 == 0
                            : p.weight_dtype == kFloat32 && p.compute_dtype == kFloat32;
  if (direct) {
    const int64_t start = first * p.weight_stride;
    return {static_cast<const uint32_t*>(p.weight) + (PAIRS ? start / 2 : start), PAIRS ? p.weight_stride / 2 : p.weight_stride};
  }
  for (int64_t v = 0; v < count; v++) convert_row<PAIRS>(weight_of(p), (first + v) * p.weight_stride, p.width, copy + v * depth);
  return {copy, depth};
}

// The same tile with the tokens as the inner dimension, (words of tokens, width), from rows of words.
template <bool PAIRS>
Tile weight_columns(const Problem& p, Tile rows, int64_t count, uint32_t* out) {
  if (!PAIRS) return rows;
  const int64_t depth = words<PAIRS>(count), pairs = p.width / 2;
  for (int64_t k = 0; k < depth; k++) {
    const uint32_t* even = rows.data + 2 * k * rows.stride;
    const bool last = 2 * k + 1 >= count;
    const uint32_t* odd = last ? even : even + rows.stride;
    const uint32_t keep = last ? 0u : 0xffffffffu;
    uint32_t* to = out + k * p.width;
    for (int64_t j = 0; j < pairs; j++) {
      const uint32_t a = even[j], b = odd[j] & keep;
      to[2 * j] = (a & 0xffffu) | b << 16;
      to[2 * j + 1] = a >> 16 | (b & 0xffff0000u);
    }
    if (p.width % 2) to[2 * pairs] = (even[pairs] & 0xffffu) | (odd[pairs] & keep) << 16;
  }
  return {out, p.width};
}

// ---- softmax of a tile --------------------------------------------------------------------------------------------------------

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

// Running softmax of one vector of rows. `max` may lag behind the largest logit seen: sums are rescaled only when they would grow by
// more than exp(STEP), which spares most passes over the direction.
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

// A panel's numbers as float16. They are read again only after the whole vocabulary has gone by: past the caches, where possible.
inline void keep(uint16_t* to, const vf* x) {
#if LANES == 16
  const __m256i low = _mm512_cvtps_ph(reinterpret_cast<__m512>(x[0]), _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(reinterpret_cast<__m512>(x[1]), _MM_FROUND_TO_NEAREST_INT);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#elif LANES == 8
  for (int j = 0; j < VECTORS; j++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * LANES), _mm256_cvtps_ph(reinterpret_cast<__m256>(x[j]), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < ROWS; i++) to[i] = round_f16(x[i / LANES][i % LANES]);
#endif
}

inline vf load_f16(const uint16_t* from) {
#if LANES == 16
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif LANES == 8
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  vf x;
  for (int64_t i = 0; i < LANES; i++) x[i] = widen_f16(from[i]);
  return x;
#endif
}

#if defined(HAS_PAIRS)
inline __m256i to_bf16(vf x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))); }

// bfloat16 of `even` in the low halves, of `odd` in the high ones.
inline vu interleave(vf even, vf odd) {
  const vu low = reinterpret_cast<vu>(_mm512_cvtepu16_epi32(to_bf16(even)));
  const vu high = reinterpret_cast<vu>(_mm512_cvtepu16_epi32(to_bf16(odd)));
  return low | high << 16;
}

inline void store_bf16(uint32_t* to, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }
#else
inline vu interleave(vf, vf) { return vu{}; }
inline void store_bf16(uint32_t*, vf) {}
#endif

// ---- forward ------------------------------------------------------------------------------------------------------------------

// What a slice of the vocabulary finds for a panel: the fields of Running, lane by lane, the target's logit, and the direction
// (width, ROWS), without the target's share.
enum Field { kMax, kSum, kLargest, kWeighted, kTotal, kSquares, kTarget, kFields };

inline int64_t part_size(const Problem& p) { return (kFields + (p.direction ? p.width : 0)) * ROWS; }

// The logits of one tile for one panel: updates the running softmax, and leaves exp(z - max) (times the slope, under softcap) as the
// operand of the direction. Returns whether the direction so far must be scaled by `factor`. EXTRA: statistics or softcap are wanted.
template <bool PAIRS, bool EXTRA>
bool softmax_tile(const Problem& p, int64_t count, const float* z, Running* running, vf* factor, uint32_t* weights, uint16_t* kept, float* kept_max) {
  vf top[VECTORS], sum[VECTORS], max[VECTORS], before[VECTORS];
  for (int j = 0; j < VECTORS; j++) top[j] = all(std::numeric_limits<float>::lowest());
  for (int64_t v = 0; v < count; v++)
    for (int j = 0; j < VECTORS; j++) top[j] = larger(load(z + v * ROWS + j * LANES), top[j]);
  bool moved = false;
  for (int j = 0; j < VECTORS; j++) {
    moved |= rebase(running[j], top[j], factor[j]);
    max[j] = running[j].max;
    sum[j] = before[j] = vf{};
    if (kept) store(kept_max + j * LANES, max[j]);
  }
  for (int64_t v = 0; v < count; v++) {
    vf e[VECTORS];
    for (int j = 0; j < VECTORS; j++) {
      const vf logit = load(z + v * ROWS + j * LANES), shifted = logit - max[j];
      e[j] = exponential(shifted);
      sum[j] += e[j];
      if (!EXTRA) continue;
      Running& r = running[j];
      if (p.entropy) r.weighted += select(e[j] > 0.0f, e[j] * shifted, e[j]);
      if (p.mean_logits) r.total += logit;
      if (p.aligned_logps) r.squares += e[j] * e[j];
    }
    if (kept) keep(kept + v * ROWS, e);
    if (!p.direction) continue;
    if (EXTRA && p.softcap)
      for (int j = 0; j < VECTORS; j++) e[j] *= slope(p, load(z + v * ROWS + j * LANES));
    for (int j = 0; j < VECTORS; j++) {
      if (!PAIRS) store(reinterpret_cast<float*>(weights) + v * ROWS + j * LANES, e[j]);
      else if (v % 2) *reinterpret_cast<vu*>(weights + v / 2 * ROWS + j * LANES) = interleave(before[j], e[j]);
      else if (v + 1 == count) *reinterpret_cast<vu*>(weights + v / 2 * ROWS + j * LANES) = interleave(e[j], vf{});
      before[j] = e[j];
    }
  }
  for (int j = 0; j < VECTORS; j++) add_exactly(running[j], sum[j]);
  return moved;
}

// Adds what another slice of the vocabulary found for the same panel.
void merge(const Problem& p, float* total, const float* part) {
  for (int64_t j = 0; j < ROWS; j += LANES) {
    auto field = [&](float* of, Field which) { return of + which * ROWS + j; };
    auto other = [&](Field which) { return load(part + which * ROWS + j); };
    const vf old = load(field(total, kMax)), max = larger(old, other(kMax));
    const vf shift = larger(old - max, all(-1e4f)), other_shift = larger(other(kMax) - max, all(-1e4f));
    const vf factor = exponential(shift), other_factor = exponential(other_shift);
    const vf sum = load(field(total, kSum)), weighted = load(field(total, kWeighted));
    store(field(total, kWeighted), factor * (weighted + select(sum > 0.0f, shift * sum, vf{})) +
                                       other_factor * (other(kWeighted) + select(other(kSum) > 0.0f, other_shift * other(kSum), vf{})));
    store(field(total, kMax), max);
    store(field(total, kSum), factor * sum + other_factor * other(kSum));
    store(field(total, kLargest), larger(load(field(total, kLargest)), other(kLargest)));
    store(field(total, kTotal), load(field(total, kTotal)) + other(kTotal));
    store(field(total, kSquares), factor * factor * load(field(total, kSquares)) + other_factor * other_factor * other(kSquares));
    // Only the slice that holds the target knows its logit; the others hold 0.
    store(field(total, kTarget), load(field(total, kTarget)) + other(kTarget));
    if (!p.direction) continue;
    for (int64_t h = 0; h < p.width; h++) {
      float* at = total + (kFields + h) * ROWS + j;
      store(at, factor * load(at) + other_factor * load(part + (kFields + h) * ROWS + j));
    }
  }
}

// Log-probs, statistics and directions of one panel, once the whole vocabulary has gone by.
void finish_panel(const Problem& p, int64_t panel, const float* part) {
  const Operand weight = weight_of(p);
  const int64_t first = panel * ROWS, there = std::min(ROWS, p.rows - first);
  for (int64_t lane = 0; lane < there; lane++) {
    const int64_t row = first + lane;
    auto field = [&](Field which) { return double(part[which * ROWS + lane]); };
    const double sum = field(kSum), log_sum = std::log(sum), target = field(kTarget), logp = target - field(kMax) - log_sum;
    p.lse[row] = float(log_sum + field(kMax));
    p.logps[row] = float(logp);
    if (p.entropy) p.entropy[row] = float(log_sum - field(kWeighted) / sum);
    if (p.mean_logits) p.mean_logits[row] = float(field(kTotal) / double(p.vocabulary));
    if (p.token_accuracy) p.token_accuracy[row] = target >= field(kLargest) ? 1.0f : 0.0f;
    if (p.aligned_logps) p.aligned_logps[row] = float(logp - (std::log(field(kSquares)) - 2.0 * log_sum));
    if (!p.direction) continue;
    const float of_target = float(-std::expm1(logp)) * (p.softcap ? slope(p, all(float(target)))[0] : p.scale);
    const float of_others = float((p.softcap ? 1.0 : double(p.scale)) / sum);
    for (int64_t h = 0; h < p.width; h++)
      p.direction[row * p.width + h] = of_target * weight.value(p.targets[row] * p.weight_stride + h) - of_others * part[(kFields + h) * ROWS + lane];
  }
}

// Panels of a block.
inline int64_t panels_in(const Problem& p, int64_t block) { return std::min(BLOCK, (p.rows + ROWS - 1) / ROWS - block * BLOCK); }

// One slice of the vocabulary for the panels of one block; `parts` has one part a panel.
template <bool PAIRS>
void forward_slice(const Problem& p, int64_t block, int64_t slice, const uint32_t* packed, float* parts) {
  const int64_t panels = (p.rows + ROWS - 1) / ROWS, start = block * BLOCK, mine = panels_in(p, block);
  const int64_t depth = words<PAIRS>(p.width), part_stride = part_size(p), tiles = (p.vocabulary + TILE - 1) / TILE;
  const int64_t first = tiles * slice / SLICES, last = tiles * (slice + 1) / SLICES;
  Scratch logits(TILE * ROWS), weights(TILE * ROWS), copy(TILE * depth), columns(PAIRS ? TILE / 2 * p.width : 1);
  Running running[BLOCK][VECTORS];
  for (int64_t i = 0; i < mine; i++) {
    for (int64_t j = 0; j < VECTORS; j++) reset(running[i][j]);
    std::fill(parts + i * part_stride + kTarget * ROWS, parts + (i + 1) * part_stride, 0.0f);
  }
  for (int64_t t = first; t < last; t++) {
    const int64_t token = t * TILE, count = std::min(TILE, p.vocabulary - token);
    const Tile rows = weight_rows<PAIRS>(p, token, count, copy.get());
    const Tile by_column = p.direction ? weight_columns<PAIRS>(p, rows, count, columns.get()) : Tile{};
    for (int64_t i = 0; i < mine; i++) {
      float *z = logits.floats(), *part = parts + i * part_stride, *direction = part + kFields * ROWS;
      product<PAIRS>(count, depth, rows.data, rows.stride, 1, packed + i * depth * ROWS, z, ROWS, false);
      transform(p, token, count, z);
      for (int64_t lane = 0; lane < ROWS && (start + i) * ROWS + lane < p.rows; lane++) {
        const int64_t here = p.targets[(start + i) * ROWS + lane] - token;
        if (here >= 0 && here < count) part[kTarget * ROWS + lane] = z[here * ROWS + lane];
      }
      vf factor[VECTORS];
      const int64_t place = t * panels + start + i;
      uint16_t* kept = p.kept ? p.kept + place * TILE * ROWS : nullptr;
      float* kept_max = p.kept ? p.kept_max + place * ROWS : nullptr;
      const bool extra = p.softcap || p.entropy || p.mean_logits || p.aligned_logps;
      const bool moved = (extra ? softmax_tile<PAIRS, true> : softmax_tile<PAIRS, false>)(p, count, z, running[i], factor, weights.get(), kept, kept_max);
      if (!p.direction) continue;
      // The target's own share is added exactly at the end: near certainty, 1 - p would drown in the rounding of p.
      for (int64_t lane = 0; lane < ROWS && (start + i) * ROWS + lane < p.rows; lane++) {
        const int64_t here = p.targets[(start + i) * ROWS + lane] - token;
        if (here < 0 || here >= count) continue;
        uint32_t& word = weights.get()[(PAIRS ? here / 2 : here) * ROWS + lane];
        word &= !PAIRS ? 0u : here % 2 ? 0xffffu : 0xffff0000u;
      }
      if (moved && t > first)
        for (int64_t h = 0; h < p.width; h++)
          for (int64_t j = 0; j < VECTORS; j++) store(direction + h * ROWS + j * LANES, factor[j] * load(direction + h * ROWS + j * LANES));
      product<PAIRS>(p.width, words<PAIRS>(count), by_column.data, 1, by_column.stride, weights.get(), direction, ROWS, true);
    }
  }
  for (int64_t i = 0; i < mine; i++)
    for (int64_t j = 0; j < VECTORS; j++) {
      const Running& r = running[i][j];
      float* part = parts + i * part_stride + j * LANES;
      store(part + kMax * ROWS, r.max);
      store(part + kSum * ROWS, r.sum);
      store(part + kLargest * ROWS, r.largest);
      store(part + kWeighted * ROWS, r.weighted);
      store(part + kTotal * ROWS, r.total);
      store(part + kSquares * ROWS, r.squares);
    }
}

// Runs f(0) ... f(count - 1) on the problem's threads; which thread runs what does not change a result.
template <class F>
void parallel(const Problem& p, int64_t count, const F& f) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
#endif
  for (int64_t i = 0; i < count; i++) f(i);
}

template <bool PAIRS>
void pack_block(const Problem& p, int64_t block, uint32_t* packed) {
  const int64_t words_of_panel = words<PAIRS>(p.width) * ROWS;
  for (int64_t i = 0; i < panels_in(p, block); i++) pack_rows<PAIRS>(p, (block * BLOCK + i) * ROWS, packed + i * words_of_panel);
}

// The vocabulary goes by in slices that depend on nothing but its size, and they are merged in order: a row's log-prob is the same
// whatever rows it comes with, and however many threads there are.
template <bool PAIRS>
void forward_as(const Problem& p) {
  const int64_t panels = (p.rows + ROWS - 1) / ROWS, blocks = (panels + BLOCK - 1) / BLOCK, size = part_size(p);
  const int64_t words_of_block = BLOCK * words<PAIRS>(p.width) * ROWS;
  if (blocks >= 2 * p.threads) {
    parallel(p, blocks, [&](int64_t block) {
      Scratch packed(words_of_block), totals(BLOCK * size), parts(BLOCK * size);
      pack_block<PAIRS>(p, block, packed.get());
      for (int64_t slice = 0; slice < SLICES; slice++) {
        forward_slice<PAIRS>(p, block, slice, packed.get(), slice ? parts.floats() : totals.floats());
        for (int64_t i = 0; slice && i < panels_in(p, block); i++) merge(p, totals.floats() + i * size, parts.floats() + i * size);
      }
      for (int64_t i = 0; i < panels_in(p, block); i++) finish_panel(p, block * BLOCK + i, totals.floats() + i * size);
    });
    return;
  }
  // Few rows: let the slices run side by side.
  Scratch packed(blocks * words_of_block), parts(SLICES * panels * size);
  parallel(p, blocks, [&](int64_t block) { pack_block<PAIRS>(p, block, packed.get() + block * words_of_block); });
  parallel(p, blocks * SLICES, [&](int64_t item) {
    const int64_t block = item % blocks, slice = item / blocks;
    forward_slice<PAIRS>(p, block, slice, packed.get() + block * words_of_block, parts.floats() + (slice * panels + block * BLOCK) * size);
  });
  parallel(p, panels, [&](int64_t panel) {
    float* total = parts.floats() + panel * size;
    for (int64_t slice = 1; slice < SLICES; slice++) merge(p, total, total + slice * panels * size);
    finish_panel(p, panel, total);
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------

// Adds the gradients of one tile of tokens, over all rows: G = c * (onehot - softmax) * slope, then G . hidden.
template <bool PAIRS>
void backward_tile(const Problem& p, int64_t t, const uint32_t* packed, const uint32_t* by_column, int64_t all_depth) {
  const int64_t panels = (p.rows + ROWS - 1) / ROWS, depth = words<PAIRS>(p.width), column_panels = (p.width + ROWS - 1) / ROWS;
  const int64_t token = t * TILE, count = std::min(TILE, p.vocabulary - token), step = words<PAIRS>(BLOCK * ROWS);
  Scratch logits(TILE * ROWS), gradient(TILE * step), copy(p.kept ? 1 : TILE * depth), rest(TILE * ROWS);
  const Tile rows = p.kept ? Tile{} : weight_rows<PAIRS>(p, token, count, copy.get());
  for (int64_t block = 0; block * BLOCK < panels; block++) {
    const int64_t mine = std::min(BLOCK, panels - block * BLOCK);
    for (int64_t i = 0; i < mine; i++) {
      const int64_t panel = block * BLOCK + i, place = t * panels + panel;
      float* z = logits.floats();
      alignas(64) float c[ROWS], lse[ROWS];
      for (int64_t lane = 0; lane < ROWS; lane++) {
        const bool there = panel * ROWS + lane < p.rows;
        c[lane] = there ? p.coefficients[panel * ROWS + lane] : 0.0f;
        lse[lane] = there ? p.lse[panel * ROWS + lane] : 0.0f;
      }
      if (!p.kept) {
        product<PAIRS>(count, depth, rows.data, rows.stride, 1, packed + panel * depth * ROWS, z, ROWS, false);
        transform(p, token, count, z);
      }
      for (int64_t j = 0; j < VECTORS; j++) {
        const vf own = load(c + j * LANES), norm = load(lse + j * LANES);
        const vf kept_scale = p.kept ? own * p.scale * exponential(load(p.kept_max + place * ROWS + j * LANES) - norm) : vf{};
        for (int64_t v = 0; v < count; v++) {
          float* at = z + v * ROWS + j * LANES;
          if (p.kept) {
            store(at, -kept_scale * load_f16(p.kept + (place * TILE + v) * ROWS + j * LANES));
          } else {
            const vf logit = load(at);
            store(at, -own * exponential(logit - norm) * slope(p, logit));
          }
        }
      }
      for (int64_t lane = 0; lane < ROWS && panel * ROWS + lane < p.rows; lane++) {
        const int64_t row = panel * ROWS + lane, here = p.targets[row] - token;
        if (here < 0 || here >= count) continue;
        // c * (1 - p) * slope, with p and the target's logit as the forward pass found them.
        const float logp = p.logps[row];
        const float at_target = p.softcap ? slope(p, all(logp + p.lse[row]))[0] : p.scale;
        z[here * ROWS + lane] = -c[lane] * std::expm1(logp) * at_target;
      }
      if (p.bias_gradient)
        for (int64_t v = 0; v < count; v++) {
          double sum = 0;
          for (int64_t lane = 0; lane < ROWS; lane++) sum += z[v * ROWS + lane];
          p.bias_gradient[token + v] += float(sum);
        }
      if (!p.weight_gradient) continue;
      for (int64_t v = 0; v < count; v++)
        for (int64_t j = 0; j < VECTORS; j++) {
          const vf g = load(z + v * ROWS + j * LANES);
          uint32_t* to = gradient.get() + v * step + words<PAIRS>(i * ROWS + j * LANES);
          if (PAIRS) store_bf16(to, g);
          else store(reinterpret_cast<float*>(to), g);
        }
    }
    if (!p.weight_gradient) continue;
    for (int64_t panel = 0; panel < column_panels; panel++) {
      const uint32_t* b = by_column + (panel * all_depth + block * step) * ROWS;
      float* to = p.weight_gradient + token * p.width + panel * ROWS;
      if ((panel + 1) * ROWS <= p.width) {
        product<PAIRS>(count, words<PAIRS>(mine * ROWS), gradient.get(), step, 1, b, to, p.width, true);
      } else {
        product<PAIRS>(count, words<PAIRS>(mine * ROWS), gradient.get(), step, 1, b, rest.floats(), ROWS, false);
        for (int64_t v = 0; v < count; v++)
          for (int64_t j = 0; panel * ROWS + j < p.width; j++) to[v * p.width + j] += rest.floats()[v * ROWS + j];
      }
    }
  }
}

template <bool PAIRS>
void backward_as(const Problem& p) {
  const int64_t panels = (p.rows + ROWS - 1) / ROWS, depth = words<PAIRS>(p.width), column_panels = (p.width + ROWS - 1) / ROWS;
  const int64_t all_depth = words<PAIRS>(panels * ROWS);
  Scratch packed(p.kept ? 1 : panels * depth * ROWS), by_column(p.weight_gradient ? column_panels * all_depth * ROWS : 1);
  if (!p.kept) parallel(p, panels, [&](int64_t panel) { pack_rows<PAIRS>(p, panel * ROWS, packed.get() + panel * depth * ROWS); });
  if (p.weight_gradient)
    parallel(p, column_panels, [&](int64_t panel) { pack_columns<PAIRS>(p, panel * ROWS, all_depth, by_column.get() + panel * all_depth * ROWS); });
  parallel(p, (p.vocabulary + TILE - 1) / TILE, [&](int64_t t) { backward_tile<PAIRS>(p, t, packed.get(), by_column.get(), all_depth); });
}

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

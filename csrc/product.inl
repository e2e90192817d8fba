// The one matrix product, and its operands in memory.

#if defined(HAS_PAIRS)
constexpr bool kHasPairs = true;
inline vf multiply_add_pairs(vf sum, vu a, vu b) {
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#else
constexpr bool kHasPairs = false;
inline vf multiply_add_pairs(vf sum, vu, vu) { return sum; }
#endif

// c (M, ROWS) (+)= a (M, depth) . b (depth, ROWS). Elements of a and b are floats, or pairs of
// bfloat16 in the inner dimension.
template <bool PAIRS, int M>
inline void product_of(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_step,
                       const uint32_t* b, float* c, int64_t c_row, bool add) {
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
inline void product_rest(int64_t rows, int64_t depth, const uint32_t* a, int64_t a_row,
                         int64_t a_step, const uint32_t* b, float* c, int64_t c_row, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return product_of<PAIRS, M>(depth, a, a_row, a_step, b, c, c_row, add);
    product_rest<PAIRS, M - 1>(rows, depth, a, a_row, a_step, b, c, c_row, add);
  }
}

template <bool PAIRS>
void product(int64_t rows, int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_step,
             const uint32_t* b, float* c, int64_t c_row, bool add) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    product_of<PAIRS, MR>(depth, a + m * a_row, a_row, a_step, b, c + m * c_row, c_row, add);
  product_rest<PAIRS, MR - 1>(rows - m, depth, a + m * a_row, a_row, a_step, b, c + m * c_row,
                              c_row, add);
}

// Cache-line aligned scratch of one thread.
class Scratch {
 public:
  explicit Scratch(int64_t words)
      : memory_(
            static_cast<uint32_t*>(std::aligned_alloc(64, size_t(words * 4 + 63) / 64 * 64 + 64))) {
  }
  uint32_t* get() { return memory_.get(); }
  float* floats() { return reinterpret_cast<float*>(memory_.get()); }

 private:
  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };
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
    return dtype == kBFloat16 ? static_cast<const uint16_t*>(data)[i]
                              : round_bf16(element(data, i, dtype));
  }
};

inline Operand hidden_of(const Problem& p) { return {p.hidden, p.dtype, p.compute_dtype}; }
inline Operand weight_of(const Problem& p) { return {p.weight, p.weight_dtype, p.compute_dtype}; }

// Words of `count` numbers in the inner dimension.
template <bool PAIRS>
constexpr int64_t words(int64_t count) {
  return PAIRS ? (count + 1) / 2 : count;
}

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
    if (first + r < p.rows)
      convert_row<PAIRS>(hidden_of(p), (first + r) * p.width, p.width, row.get());
    else
      std::fill(row.get(), row.get() + depth, 0u);
    for (int64_t k = 0; k < depth; k++) out[k * ROWS + r] = row.get()[k];
  }
}

// ROWS columns of a panel's hidden states as (words of rows, columns); columns and rows past the
// end are 0.
template <bool PAIRS>
void pack_columns(const Problem& p, int64_t first, int64_t first_row, uint32_t* out) {
  const Operand hidden = hidden_of(p);
  for (int64_t k = 0; k < words<PAIRS>(ROWS); k++)
    for (int64_t j = 0; j < ROWS; j++) {
      const int64_t column = first + j, row = first_row + (PAIRS ? 2 * k : k);
      uint32_t value = 0;
      if (column < p.width && row < p.rows) {
        value = PAIRS ? hidden.bf16(row * p.width + column)
                      : bits(hidden.value(row * p.width + column));
        if (PAIRS && row + 1 < p.rows)
          value |= uint32_t(hidden.bf16((row + 1) * p.width + column)) << 16;
      }
      out[k * ROWS + j] = value;
    }
}

// A tile of weights as rows of words: the weights themselves where they lie that way already, else
// a copy.
struct Tile {
  const uint32_t* data;
  int64_t stride;
};

template <bool PAIRS>
Tile weight_rows(const Problem& p, int64_t first, int64_t count, uint32_t* copy) {
  const int64_t depth = words<PAIRS>(p.width);
  const bool direct = PAIRS ? p.weight_dtype == kBFloat16 && p.width % 2 == 0 &&
                                  p.weight_stride % 2 == 0 &&
                                  reinterpret_cast<uintptr_t>(p.weight) % 4 == 0
                            : p.weight_dtype == kFloat32 && p.compute_dtype == kFloat32;
  if (direct) {
    const int64_t start = first * p.weight_stride;
    return {static_cast<const uint32_t*>(p.weight) + (PAIRS ? start / 2 : start),
            PAIRS ? p.weight_stride / 2 : p.weight_stride};
  }
  for (int64_t v = 0; v < count; v++)
    convert_row<PAIRS>(weight_of(p), (first + v) * p.weight_stride, p.width, copy + v * depth);
  return {copy, depth};
}

// Fetches weights ahead of their turn.
inline void prefetch_weights(const Problem& p, int64_t first, int64_t count) {
  const int64_t size = p.weight_dtype == kFloat32 ? 4 : 2;
  count = std::min(count, p.vocabulary - first);
  for (int64_t v = 0; v < count; v++) {
    const char* row = static_cast<const char*>(p.weight) + (first + v) * p.weight_stride * size;
    for (int64_t at = 0; at < p.width * size; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// The same tile with the tokens as the inner dimension, (words of tokens, width), from rows of
// words.
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

// Vectors, and what is done to single numbers: rounding, exp, tanh.

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4)));

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
inline vf all(float x) { return vf{} + x; }
inline vf select(vi mask, vf yes, vf no) {
  return reinterpret_cast<vf>((mask & reinterpret_cast<vi>(yes)) |
                              (~mask & reinterpret_cast<vi>(no)));
}
inline vf larger(vf a, vf b) { return select(a > b, a, b); }

inline float from_bits(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float widen_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

inline uint16_t round_bf16(
    float x) {  // to nearest even; without branches, so that loops over it are vectorised
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

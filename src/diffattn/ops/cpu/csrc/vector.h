// Vectors of float32 as wide as the registers that the compiler was told of, in the vector types that GCC and Clang
// share: one source for every instruction set. Wider vectors than the registers would be split, and GCC splits their
// comparisons and selections into single numbers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace diffattn {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Floats splat(float x) {
  return Floats{} + x;
}

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Floats load(const c10::BFloat16* from) {
  // GCC makes two conversions of half a vector of this, and joins them.
#if defined(__AVX512F__)
  const Words x = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  const Words x = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words x = __builtin_convertvector(halves, Words);
#endif
  return (Floats)(x << 16);
}

inline Floats load(const c10::Half* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
#else
  Floats x;
  for (int lane = 0; lane < kLanes; ++lane)
    x[lane] = from[lane];
  return x;
#endif
}

// The first `count` values, zeros behind them; nothing beyond them is read.
template <typename scalar>
inline Floats load_part(const scalar* from, int64_t count) {
  if (count >= kLanes)
    return load(from);
  scalar padded[kLanes] = {};
  std::memcpy(static_cast<void*>(padded), from, count * sizeof(scalar));
  return load(padded);
}

// The same for words, whatever they hold.
inline Words load_words(const void* from, int64_t count) {
  Words x{};
  if (count >= kLanes)
    std::memcpy(&x, from, sizeof(x));
  else
    std::memcpy(&x, from, count * sizeof(uint32_t));
  return x;
}

inline void store(float* to, Floats x) {
  std::memcpy(to, &x, sizeof(x));
}

inline Ints load_ints(const int32_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// float32 bits whose upper half is the bfloat16 nearest to x, ties to even. NaN stays NaN but for payloads above it.
inline Words rounded(Floats x) {
  Words bits = (Words)x;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(c10::BFloat16* to, Floats x) {
  Halves half = __builtin_convertvector(rounded(x) >> 16, Halves);
  std::memcpy(static_cast<void*>(to), &half, sizeof(half));
}

inline void store(c10::Half* to, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
  for (int lane = 0; lane < kLanes; ++lane)
    to[lane] = c10::Half(float(x[lane]));
#endif
}

// The first `count` values alone.
template <typename scalar>
inline void store_part(scalar* to, Floats x, int64_t count) {
  if (count >= kLanes)
    return store(to, x);
  scalar padded[kLanes];
  store(padded, x);
  std::memcpy(static_cast<void*>(to), padded, count * sizeof(scalar));
}

// Stores x and returns what was stored.
inline Floats store_as(float* to, Floats x) {
  store(to, x);
  return x;
}

inline Floats store_as(c10::BFloat16* to, Floats x) {
  const Words bits = rounded(x) & 0xffff0000u;
  Halves half = __builtin_convertvector(bits >> 16, Halves);
  std::memcpy(static_cast<void*>(to), &half, sizeof(half));
  return (Floats)bits;
}

// Two rows as bfloat16 pairs, lane by lane: the layout in which matrix products take their right-hand side.
inline void store_pairs(c10::BFloat16* to, Floats even, Floats odd) {
  Words pairs = (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
  std::memcpy(static_cast<void*>(to), &pairs, sizeof(pairs));
}

inline Floats maximum(Floats a, Floats b) {
  return a > b ? a : b;
}

inline float sum(Floats x) {
  float lanes[kLanes], total = 0;
  store(lanes, x);
  for (int lane = 0; lane < kLanes; ++lane)
    total += lanes[lane];
  return total;
}

// Lanes of a, or of b where `lane` is kLanes or more, in the order given. GCC has had Clang's spelling since 12.
template <int... lane, typename Vector>
inline Vector shuffle(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, Ints{lane...});
#endif
}

// Within each four lanes: the two of a that are `odd` (or even), then the two of b. One instruction everywhere.
template <int odd, int... lane>
inline Floats every_second(Floats a, Floats b, std::integer_sequence<int, lane...>) {
  return shuffle<(lane / 4 * 4 + lane % 2 * 2 + odd + (lane % 4 < 2 ? 0 : kLanes))...>(a, b);
}

// Blocks of `size` lanes change places with their neighbours.
template <int size, int... lane>
inline Floats swapped(Floats x, std::integer_sequence<int, lane...>) {
  return shuffle<(lane ^ size)...>(x, x);
}

// Four sums over lanes at once, halving the vectors instead of each of them.
inline void sums_of_4(Floats a, Floats b, Floats c, Floats d, float* to) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  auto halved = [&](Floats x, Floats y) { return every_second<0>(x, y, lanes) + every_second<1>(x, y, lanes); };
  // Sums of two of a and of b in each four lanes, of c and of d; then of four of each.
  Floats all = halved(halved(a, b), halved(c, d));
  if constexpr (kLanes > 8)
    all += swapped<8>(all, lanes);
  if constexpr (kLanes > 4)
    all += swapped<4>(all, lanes);
  std::memcpy(to, &all, 4 * sizeof(float));
}

// kLanes × kLanes words, rows to columns: a stage lets blocks of size × size words change places across the diagonal.
template <int size, int... lane>
inline void transpose_stage(Words (&x)[kLanes], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row)
    if (!(row & size)) {
      const Words a = x[row], b = x[row + size];
      x[row] = shuffle<(lane & size ? kLanes + (lane ^ size) : lane)...>(a, b);
      x[row + size] = shuffle<(lane & size ? kLanes + lane : lane ^ size)...>(a, b);
    }
}

inline void transpose(Words (&x)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  if constexpr (kLanes > 8)
    transpose_stage<8>(x, lanes);
  if constexpr (kLanes > 4)
    transpose_stage<4>(x, lanes);
  transpose_stage<2>(x, lanes);
  transpose_stage<1>(x, lanes);
}

// 2^x for x up to 127; 0 below −126, where −inf is, and exactly 1 at 0. x is split into the nearest integer, which is
// added to the exponent, and a rest in [−½, ½], whose power is a polynomial: relative error 2e-9 with degree 6, which
// leaves that of rounding, 3e-6 with degree 4 and 1e-4 with degree 3.
template <int degree>
inline Floats exp2(Floats x) {
  static_assert(degree == 3 || degree == 4 || degree == 6);
  const Floats magic = splat(12582912.0f);  // 1.5 · 2^23: the sum's low bits hold the integer
  const Floats shifted = x + magic;
  const Floats rest = x - (shifted - magic);
  Floats power;
  if constexpr (degree == 6) {
    power = splat(0.0001535451917f);
    power = power * rest + 0.001339905261f;
    power = power * rest + 0.009618433404f;
    power = power * rest + 0.05550331855f;
    power = power * rest + 0.2402264794f;
    power = power * rest + 0.6931472033f;
  } else if constexpr (degree == 4) {
    power = splat(0.009582855096f);
    power = power * rest + 0.05590643033f;
    power = power * rest + 0.2402409861f;
    power = power * rest + 0.6931241928f;
  } else {
    power = splat(0.05500893185f);
    power = power * rest + 0.2422109594f;
    power = power * rest + 0.6932829269f;
  }
  power = power * rest + 1.0f;
  const Floats scaled = (Floats)((Ints)power + ((Ints)shifted << 23));
  return x < -126.0f ? splat(0.0f) : scaled;
}

// The shortest polynomial that is twenty times finer than the rounding of a result: bfloat16 keeps 8 bits, float16 11.
template <typename scalar>
constexpr int exp_degree = std::is_same_v<scalar, float> ? 6 : std::is_same_v<scalar, c10::Half> ? 4 : 3;

}  // namespace diffattn

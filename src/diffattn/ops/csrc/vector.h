// Sixteen lanes of float32 at a time, in the vector types of GCC and Clang: one source for every instruction set, the
// compiler splits a vector where the registers are narrower.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace diffattn {

constexpr int kLanes = 16;
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
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

// The first `count` values, zeros behind them; nothing beyond them is read.
template <typename scalar>
inline Floats load_part(const scalar* from, int64_t count) {
  if (count >= kLanes)
    return load(from);
  scalar padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(scalar));
  return load(padded);
}

// The same for 16 words, whatever they hold.
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
  std::memcpy(to, &half, sizeof(half));
}

// Stores x and returns what was stored.
inline Floats store_as(float* to, Floats x) {
  store(to, x);
  return x;
}

inline Floats store_as(c10::BFloat16* to, Floats x) {
  const Words bits = rounded(x) & 0xffff0000u;
  Halves half = __builtin_convertvector(bits >> 16, Halves);
  std::memcpy(to, &half, sizeof(half));
  return (Floats)bits;
}

// Two rows as bfloat16 pairs, lane by lane: the layout in which matrix products take their right-hand side.
inline void store_pairs(c10::BFloat16* to, Floats even, Floats odd) {
  Words pairs = (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof(pairs));
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

// Four sums over lanes at once, halving the vectors instead of each of them.
inline void sums_of_4(Floats a, Floats b, Floats c, Floats d, float* to) {
  const Ints evens = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odds = evens + 1;
  const Floats ab = __builtin_shuffle(a, b, evens) + __builtin_shuffle(a, b, odds);
  const Floats cd = __builtin_shuffle(c, d, evens) + __builtin_shuffle(c, d, odds);
  // Eight sums of two of a and of b, of c and of d; then four each, two each, one each.
  Floats all = __builtin_shuffle(ab, cd, evens) + __builtin_shuffle(ab, cd, odds);
  all = __builtin_shuffle(all, all, evens & 15) + __builtin_shuffle(all, all, odds & 15);
  all = __builtin_shuffle(all, all, evens & 15) + __builtin_shuffle(all, all, odds & 15);
  std::memcpy(to, &all, 4 * sizeof(float));
}

// 16 × 16 words, rows to columns: a stage lets blocks of size × size words change places across the diagonal.
template <int size, int... lane>
inline void transpose_stage(Words (&x)[kLanes], std::integer_sequence<int, lane...>) {
  const Ints upper = {(lane & size ? kLanes + (lane ^ size) : lane)...};
  const Ints lower = {(lane & size ? kLanes + lane : lane ^ size)...};
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row)
    if (!(row & size)) {
      const Words a = x[row], b = x[row + size];
      x[row] = __builtin_shuffle(a, b, upper);
      x[row + size] = __builtin_shuffle(a, b, lower);
    }
}

inline void transpose(Words (&x)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  transpose_stage<8>(x, lanes);
  transpose_stage<4>(x, lanes);
  transpose_stage<2>(x, lanes);
  transpose_stage<1>(x, lanes);
}

// 2^x for x up to 127; 0 below −126, where −inf is, and exactly 1 at 0. x is split into the nearest integer, which is
// added to the exponent, and a rest in [−½, ½], whose power is a polynomial: relative error 2e-9 with degree 6, which
// leaves that of rounding, and 1e-4 with degree 3.
template <int degree>
inline Floats exp2(Floats x) {
  static_assert(degree == 3 || degree == 6);
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
  } else {
    power = splat(0.05500893185f);
    power = power * rest + 0.2422109594f;
    power = power * rest + 0.6932829269f;
  }
  power = power * rest + 1.0f;
  const Floats scaled = (Floats)((Ints)power + ((Ints)shifted << 23));
  return x < -126.0f ? splat(0.0f) : scaled;
}

// bfloat16 keeps 8 bits: the short polynomial is 20 times finer than its rounding.
template <typename scalar>
constexpr int exp_degree = sizeof(scalar) == 2 ? 3 : 6;

}  // namespace diffattn

// Products of small matrices, C (m × n, float32) = or += A (m × k) · B (k × n), whose rows are lda, ldb and ldc apart.
// In float32 by the code below, which is as fast as oneDNN's kernels on tiles that lie in the first caches, and the
// same on every processor; in bfloat16 by oneDNN's kernels, which PyTorch exports, where the processor has such products.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "vector.h"

namespace diffattn {

// A block of `height` rows and `width` vectors of C is summed in registers: as many as there are, less a row of B.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockHeight = 6, kBlockWidth = 4;
#else
constexpr int kBlockHeight = 6, kBlockWidth = 2;
#endif

constexpr int64_t kChain = 32;  // products that are summed one after the other, then added to C: fewer round less

template <int height, int width, bool part>
inline void multiply_block(
    int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add,
    int64_t columns) {
  for (int64_t first = 0; first < k; first += kChain, add = true) {
    Floats sums[height][width];
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < width; ++j)
        sums[i][j] = splat(0.0f);
    for (int64_t l = first; l < std::min(first + kChain, k); ++l) {
      Floats row[width];
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j)
        row[j] = part ? load_part(b + l * ldb, columns) : load(b + l * ldb + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < width; ++j)
          sums[i][j] += row[j] * a[i * lda + l];
    }
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < width; ++j) {
        float* to = c + i * ldc + j * kLanes;
        if constexpr (part)
          store_part(to, add ? load_part(to, columns) + sums[i][j] : sums[i][j], columns);
        else
          store(to, add ? load(to) + sums[i][j] : sums[i][j]);
      }
  }
}

template <int height>
inline void multiply_rows(
    int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + kBlockWidth * kLanes <= n; j += kBlockWidth * kLanes)
    multiply_block<height, kBlockWidth, false>(k, a, lda, b + j, ldb, c + j, ldc, add, kLanes);
  for (; j + kLanes <= n; j += kLanes)
    multiply_block<height, 1, false>(k, a, lda, b + j, ldb, c + j, ldc, add, kLanes);
  if (j < n)
    multiply_block<height, 1, true>(k, a, lda, b + j, ldb, c + j, ldc, add, n - j);
}

// Asks for the rows of the next block, which may lie a whole token apart, where no processor foresees them.
template <bool written>
inline void prefetch(const float* rows, int64_t count, int64_t width, int64_t row) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; j += 64 / int64_t(sizeof(float)))
      __builtin_prefetch(rows + i * row + j, written);
}

constexpr int64_t kFirstCache = 16 << 10;  // bytes of it that rows of B may take: half of the smallest

// A and C are gone through once for every so many rows of B as stay in the first cache.
inline void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  const int64_t kept = std::max<int64_t>(kFirstCache / (n * int64_t(sizeof(float))), 16);
  for (int64_t l = 0; l < k; l += kept, a += kept, b += kept * ldb, add = true) {
    const int64_t count = std::min(kept, k - l);
    int64_t i = 0;
    // Eight rows are two blocks of four rather than one of six and one of two, which would wait for its sums.
    for (; m - i >= kBlockHeight && m - i != 8; i += kBlockHeight) {
      const int64_t next = i + kBlockHeight, coming = std::min<int64_t>(kBlockHeight, m - next);
      if (lda > k)
        prefetch<false>(a + next * lda, coming, count, lda);
      if (ldc > n)
        prefetch<true>(c + next * ldc, coming, n, ldc);
      multiply_rows<kBlockHeight>(n, count, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    }
    for (; m - i >= 4; i += 4)
      multiply_rows<4>(n, count, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    for (; m - i >= 2; i += 2)
      multiply_rows<2>(n, count, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    if (i < m)
      multiply_rows<1>(n, count, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
}

// Every processor that multiplies bfloat16 has AVX512: what is compiled for less needs no such products.
#if defined(__AVX512F__)
#define DIFFATTN_BFLOAT16_PRODUCTS 1
#else
#define DIFFATTN_BFLOAT16_PRODUCTS 0
#endif
constexpr bool kBfloat16Products = DIFFATTN_BFLOAT16_PRODUCTS;

// B in pairs of rows: the numbers of two rows, column by column, side by side. k is even.
inline void multiply(
    int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, std::max(lda, k), ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}

// What a thread calls when it is done: oneDNN's kernels hold the matrix registers of a processor that has them.
template <typename element>
void end_products() {
  if constexpr (std::is_same_v<element, at::BFloat16>)
    at::native::cpublas::brgemm_release();
}

}  // namespace diffattn

// One call of differential attention as the kernels see it: shapes, strides, masks, blocks of query rows, workers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "vector.h"

namespace diffattn {

constexpr double kLog2E = 1.4426950408889634;

// (batch, sequence, heads, width) with any strides but the last, which is 1.
template <typename scalar>
struct View {
  scalar* data;
  int64_t batch, row, head;

  scalar* at(int64_t b, int64_t t, int64_t h) const {
    return data + b * batch + t * row + h * head;
  }
};

template <typename scalar>
View<scalar> view(const at::Tensor& x) {
  return {x.data_ptr<scalar>(), x.stride(0), x.stride(1), x.stride(2)};
}

struct Range {
  int64_t begin, end;
};

struct Problem {
  int64_t B, T, S, H, G, R, D, Dv;  // R output heads share a group
  int64_t tile;                    // keys that are computed together
  bool one_key, causal;
  float scale, log2_scale;  // of the scores; log2_scale makes powers of 2 of them
  const int32_t* queries;   // (2, B, S) the first query that sees a key and the first behind it that does not, or null

  int64_t tiles() const {
    return (S + tile - 1) / tile;
  }

  // The queries of sequence b that see key s.
  Range queries_of(int64_t b, int64_t s) const {
    if (queries)
      return {queries[b * S + s], queries[(B + b) * S + s]};
    return {causal ? s - (S - T) : 0, T};
  }
};

// Up to `rows` query rows of one group that are computed together, one per lane: of one head where queries are many,
// else of several heads, so that few queries still fill the lanes.
template <int rows>
struct Lanes {
  alignas(64) int32_t t[rows];
  int64_t head[rows];
  int64_t count;
  int32_t t_min, t_max;

  static int64_t blocks(const Problem& p) {
    return p.T >= rows ? p.R * ((p.T + rows - 1) / rows) : (p.R * p.T + rows - 1) / rows;
  }

  Lanes(const Problem& p, int64_t g, int64_t block) {
    int64_t first;
    if (p.T >= rows) {
      const int64_t per_head = (p.T + rows - 1) / rows, start = block % per_head * rows;
      first = block / per_head * p.T + start;
      count = std::min<int64_t>(rows, p.T - start);
    } else {
      first = block * rows;
      count = std::min<int64_t>(rows, p.R * p.T - first);
    }
    for (int64_t lane = 0; lane < rows; ++lane) {
      // Lanes beyond the last row repeat its position; their queries are zeros and their results are dropped.
      const int64_t row = first + std::min(lane, count - 1);
      head[lane] = g * p.R + row / p.T;
      t[lane] = row % p.T;
    }
    t_min = *std::min_element(t, t + rows);
    t_max = *std::max_element(t, t + rows);
  }
};

// From the first to behind the last key that any of the queries t_min ... t_max can see.
inline Range visible(const Problem& p, int64_t b, int64_t t_min, int64_t t_max) {
  Range keys{0, p.S};
  if (!p.queries) {
    if (p.causal)
      keys.end = std::min(p.S, t_max + p.S - p.T + 1);
    return keys;
  }
  const int32_t *begin = p.queries + b * p.S, *end = begin + p.B * p.S;
  auto seen = [&](int64_t s) { return begin[s] <= t_max && end[s] > t_min; };
  while (keys.end > 0 && !seen(keys.end - 1))
    --keys.end;
  while (keys.begin < keys.end && !seen(keys.begin))
    ++keys.begin;
  return keys;
}

// Keys of one tile that a row block computes. Sixteens keep the number of different matrix products small.
inline int64_t tile_rows(const Problem& p, int64_t tile, int64_t end) {
  const int64_t start = tile * p.tile, wanted = (end - start + kLanes - 1) / kLanes * kLanes;
  return std::min({p.tile, wanted, p.S - start});
}

// C (m × n, float32) = or += A (m × k, rows of lda) · B (k × n, bfloat16 in pairs of rows).
inline void multiply(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
  at::native::cpublas::brgemm(m, n, k, std::max(lda, k), ldb, ldc, add, a, b, c, /*is_vnni=*/false);
}

inline void multiply(
    int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, std::max(lda, k), ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}

// Right-hand sides are stored in pairs of rows in bfloat16, row by row in float32.
template <typename scalar>
constexpr int64_t kPair = sizeof(scalar) == 2 ? 2 : 1;

template <typename scalar>
constexpr int64_t whole_pairs(int64_t rows) {
  return (rows + kPair<scalar> - 1) / kPair<scalar> * kPair<scalar>;
}

// Rows of words (of two halves in bfloat16), transposed: to[word * columns + row]. A null row is zeros.
template <typename Rows>
void transpose_words(const Rows& row, int64_t rows, int64_t words, uint32_t* to, int64_t columns) {
  for (int64_t first = 0; first < rows; first += kLanes)
    for (int64_t word = 0; word < words; word += kLanes) {
      Words x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        x[i] = row(first + i, word, std::min<int64_t>(kLanes, words - word));
      transpose(x);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, words - word); ++i)
        std::memcpy(to + (word + i) * columns + first, &x[i], sizeof(Words));
    }
}

// Two rows of bfloat16 as one row of pairs.
inline Words pairs(const at::BFloat16* even, const at::BFloat16* odd, int64_t count) {
  const Words low = even ? (Words)load_part(even, count) >> 16 : Words{};
  return odd ? low | (Words)load_part(odd, count) : low;
}

// The rows of a block as a right-hand side with one column per lane: (width × rows).
template <typename scalar, int rows>
void pack_columns(const View<const scalar>& x, int64_t b, const Lanes<rows>& lanes, int64_t width, scalar* to) {
  auto row = [&](int64_t lane, int64_t word, int64_t count) {
    if (lane >= lanes.count)
      return Words{};
    return load_words(x.at(b, lanes.t[lane], lanes.head[lane]) + word * kPair<scalar>, count);
  };
  transpose_words(row, rows, width / kPair<scalar>, reinterpret_cast<uint32_t*>(to), rows);
}

// Rows as a right-hand side: (count × width), a null row is zeros.
template <typename scalar, typename At>
void pack_rows(const At& at, int64_t count, int64_t width, scalar* to) {
  for (int64_t row = 0; row < count; row += kPair<scalar>, to += kPair<scalar> * width) {
    const scalar* from = at(row);
    if constexpr (kPair<scalar> == 2) {
      const scalar* next = row + 1 < count ? at(row + 1) : nullptr;
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t part = std::min<int64_t>(kLanes, width - i);
        const Words words = pairs(from ? from + i : nullptr, next ? next + i : nullptr, part);
        std::memcpy(to + 2 * i, &words, part * sizeof(uint32_t));
      }
    } else if (from) {
      std::copy(from, from + width, to);
    } else {
      std::fill(to, to + width, 0.0f);
    }
  }
}

// Scores of one tile of keys against a block of query rows, (m × rows); what a lane may not see is −inf.
template <typename scalar, int rows>
void score_tile(
    const Problem& p, const View<const scalar>& keys, int64_t b, int64_t g, int64_t start, int64_t m,
    const Lanes<rows>& lanes, const scalar* queries, float* to) {
  multiply(m, rows, p.D, keys.at(b, start, g), keys.row, queries, rows, to, rows, false);
  if (!p.queries && !(p.causal && start + m - 1 - (p.S - p.T) > lanes.t_min))
    return;
  for (int64_t i = 0; i < m; ++i) {
    const Range seen = p.queries_of(b, start + i);
    if (seen.begin <= lanes.t_min && seen.end > lanes.t_max)
      continue;
    const int32_t begin = seen.begin, end = seen.end;
    for (int lane = 0; lane < rows; lane += kLanes) {
      float* score = to + i * rows + lane;
      const Ints t = load_ints(lanes.t + lane);
      store(score, (t < begin) | (t >= end) ? splat(-kInfinity) : load(score));
    }
  }
}

// A piece of a worker's memory after another, each on a cache line of its own.
class Arena {
 public:
  explicit Arena(uintptr_t at) : at_(at) {}

  template <typename scalar>
  scalar* take(int64_t count) {
    scalar* taken = reinterpret_cast<scalar*>(at_);
    at_ += (count * sizeof(scalar) + 63) / 64 * 64;
    return taken;
  }

  uintptr_t end() const {
    return at_;
  }

 private:
  uintptr_t at_;
};

// Runs `work(unit, arena)` for every unit on all threads; each takes the next unit when it is done with its last.
// `layout(arena)` tells how much memory a worker needs.
template <typename Layout, typename Work>
void share(int64_t units, const Layout& layout, const Work& work) {
  if (units == 0)
    return;
  const int64_t workers = std::min<int64_t>(units, at::in_parallel_region() ? 1 : at::get_num_threads());
  Arena measure(0);
  layout(measure);
  const int64_t bytes = measure.end() + 64;
  const at::Tensor memory = at::empty({workers, bytes}, at::kByte);
  const auto base = reinterpret_cast<uintptr_t>(memory.data_ptr<uint8_t>());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const uintptr_t start = (base + worker * bytes + 63) / 64 * 64;
      for (int64_t unit = next++; unit < units; unit = next++)
        work(unit, Arena(start));
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace diffattn

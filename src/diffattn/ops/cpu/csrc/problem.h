// One call of differential attention as the kernels see it: shapes, strides, masks, blocks of query rows, workers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

#include "products.h"

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
  int64_t B, T, S, H, G, D, Dv;
  int64_t noise, signals;  // a group's noise heads, and the output heads that subtract each of them
  int64_t tile;            // keys that are computed together
  bool one_key, causal;
  float scale;             // of the scores
  double log2_scale;       // the same, for powers of 2
  const int32_t* queries;  // (2, B, S) the first query that sees a key and the first behind it that does not, or null

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

// The factor log2_scale of float32 scores. Where scores are far apart, rounding it would be the largest error of a map,
// so what rounding takes from it is a factor of its own; half precision is rounded more than that.
template <typename scalar>
class Powers {
 public:
  explicit Powers(const Problem& p) : high_(p.log2_scale) {
    // Rounded down, so that the rest is above 0, and −inf, which is what a masked score is, stays −inf times both.
    if (high_ > p.log2_scale)
      high_ = std::nextafter(high_, 0.0f);
    low_ = std::max(float(p.log2_scale - high_), std::numeric_limits<float>::min());
  }

  // The exponent of a difference of scores.
  Floats operator()(Floats score) const {
    return std::is_same_v<scalar, float> ? score * high_ + score * low_ : score * high_;
  }

 private:
  float high_, low_;
};

// Up to `rows` query rows of one group that are computed together, one per lane: of one noise head where queries are
// many, else of several, so that few queries still fill the lanes. The signal heads of a noise head are computed in the
// same lanes one after another, with the noise map of the first.
template <int rows>
struct Lanes {
  alignas(64) int32_t t[rows];
  int64_t head[rows];  // the noise head
  int64_t count;
  int32_t t_min, t_max;

  static int64_t blocks(const Problem& p) {
    return p.T >= rows ? p.noise * ((p.T + rows - 1) / rows) : (p.noise * p.T + rows - 1) / rows;
  }

  Lanes(const Problem& p, int64_t g, int64_t block) {
    int64_t first;
    if (p.T >= rows) {
      const int64_t per_head = (p.T + rows - 1) / rows, start = block % per_head * rows;
      first = block / per_head * p.T + start;
      count = std::min<int64_t>(rows, p.T - start);
    } else {
      first = block * rows;
      count = std::min<int64_t>(rows, p.noise * p.T - first);
    }
    for (int64_t lane = 0; lane < rows; ++lane) {
      // Lanes beyond the last row repeat its position; their queries are zeros and their results are dropped.
      const int64_t row = first + std::min(lane, count - 1);
      head[lane] = g * p.noise + row / p.T;
      t[lane] = row % p.T;
    }
    t_min = *std::min_element(t, t + rows);
    t_max = *std::max_element(t, t + rows);
  }
};

// From the first to behind the last of some keys that any of the queries t_min ... t_max can see.
inline Range visible(const Problem& p, int64_t b, int64_t t_min, int64_t t_max, Range keys) {
  if (!p.queries) {
    if (p.causal)
      keys.end = std::min(keys.end, t_max + p.S - p.T + 1);
    return keys;
  }
  const int32_t *begin = p.queries + b * p.S, *end = begin + p.B * p.S;
  auto seen = [&](int64_t s) { return begin[s] <= t_max && end[s] > t_min; };
  while (keys.end > keys.begin && !seen(keys.end - 1))
    --keys.end;
  while (keys.begin < keys.end && !seen(keys.begin))
    ++keys.begin;
  return keys;
}

// Keys of one tile that a row block computes. Sixteens keep the number of different matrix products small.
inline int64_t tile_rows(const Problem& p, int64_t tile, int64_t end) {
  const int64_t start = tile * p.tile, wanted = (end - start + 15) / 16 * 16;
  return std::min({p.tile, wanted, p.S - start});
}

// Tensors hold `scalar`, products take `element`: the same, or float32 where the processor has no products of `scalar`.
// Right-hand sides are stored in pairs of rows in bfloat16, row by row in float32.
template <typename element>
constexpr int64_t kPair = sizeof(element) == 2 ? 2 : 1;

template <typename element>
constexpr int64_t whole_pairs(int64_t rows) {
  return (rows + kPair<element> - 1) / kPair<element> * kPair<element>;
}

// Rows of words (of two halves in bfloat16), transposed: to[word * columns + row].
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

// Up to kLanes words of a row as products take them, from word number `word` on. A null row is zeros.
template <typename element, typename scalar>
Words words_of(const scalar* row, int64_t word, int64_t count) {
  if (!row)
    return Words{};
  if constexpr (sizeof(element) == 2)
    return load_words(row + 2 * word, count);
  else
    return (Words)load_part(row + word, count);
}

// Two rows of bfloat16 as one row of pairs.
inline Words pairs(const at::BFloat16* even, const at::BFloat16* odd, int64_t count) {
  const Words low = even ? (Words)load_part(even, count) >> 16 : Words{};
  return odd ? low | (Words)load_part(odd, count) : low;
}

// The rows of a block, of one signal head of each noise head or, with a step of 1, of the noise heads themselves; null
// for lanes beyond the last.
template <typename scalar, int rows>
auto rows_at(const View<const scalar>& x, int64_t b, const Lanes<rows>& lanes, int64_t step, int64_t signal) {
  return [&x, &lanes, b, step, signal](int64_t lane) -> const scalar* {
    return lane < lanes.count ? x.at(b, lanes.t[lane], lanes.head[lane] * step + signal) : nullptr;
  };
}

// Rows as a right-hand side with one column per lane: (width × rows).
template <typename element, int rows, typename At>
void pack_columns(const At& at, int64_t width, element* to) {
  auto row = [&](int64_t lane, int64_t word, int64_t count) { return words_of<element>(at(lane), word, count); };
  transpose_words(row, rows, width / kPair<element>, reinterpret_cast<uint32_t*>(to), rows);
}

// Rows as a right-hand side: (count × width), a null row is zeros.
template <typename element, typename At>
void pack_rows(const At& at, int64_t count, int64_t width, element* to) {
  for (int64_t row = 0; row < count; row += kPair<element>, to += kPair<element> * width) {
    const auto* from = at(row);
    const auto* next = kPair<element> == 2 && row + 1 < count ? at(row + 1) : nullptr;
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t part = std::min<int64_t>(kLanes, width - i);
      Words words;
      if constexpr (kPair<element> == 2)
        words = pairs(from ? from + i : nullptr, next ? next + i : nullptr, part);
      else
        words = words_of<element>(from, i, part);
      std::memcpy(static_cast<void*>(to + kPair<element> * i), &words, part * sizeof(uint32_t));
    }
  }
}

// `count` keys or values of a group from `start` on, one behind the other: a left-hand side.
template <typename element, typename scalar>
void rows_behind(
    const View<const scalar>& x, int64_t b, int64_t g, int64_t start, int64_t count, int64_t width, element* to) {
  for (int64_t i = 0; i < count; ++i, to += width) {
    const scalar* from = x.at(b, start + i, g);
    if constexpr (std::is_same_v<element, scalar>)
      std::copy(from, from + width, to);
    else
      for (int64_t j = 0; j < width; j += kLanes)
        store_part(to + j, load_part(from + j, width - j), width - j);
  }
}

// Rows as a left-hand side, `row` apart.
template <typename element>
struct Rows {
  const element* data;
  int64_t row;
};

// The same where they lie; in `buffer`, converted, where products take another type.
template <typename element, typename scalar>
Rows<element> rows_of(
    const View<const scalar>& x, int64_t b, int64_t g, int64_t start, int64_t count, int64_t width, element* buffer) {
  if constexpr (std::is_same_v<element, scalar>)
    return {x.at(b, start, g), x.row};
  rows_behind(x, b, g, start, count, width, buffer);
  return {buffer, width};
}

// Scores of one tile of keys against a block of query rows, (m × rows); what a lane may not see is −inf.
template <typename element, int rows>
void score_tile(
    const Problem& p, const Rows<element>& keys, int64_t b, int64_t start, int64_t m, const Lanes<rows>& lanes,
    const element* queries, float* to) {
  multiply(m, rows, p.D, keys.data, keys.row, queries, rows, to, rows, false);
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

template <typename scalar>
void copy_row(const float* from, int64_t width, scalar* to) {
  for (int64_t i = 0; i < width; i += kLanes)
    store_part(to + i, load_part(from + i, width - i), width - i);
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

// `work(begin, end)` for parts of 0 to `end` on PyTorch's threads. The loop itself is in PyTorch's library: OpenMP of this
// compiler, where it is not that of PyTorch's, would be a second pool of threads.
template <typename Work>
void parallel_for(int64_t end, int64_t grain, const Work& work) {
  const auto call = [](int64_t begin, int64_t end, void* work) { (*static_cast<const Work*>(work))(begin, end); };
  const auto error = torch_parallel_for(0, end, grain, call, const_cast<Work*>(&work));
  TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "fused_cpu: a thread failed");
}

// Runs `work(unit, arena)` for every unit on all threads; each takes the next unit when it is done with its last.
// `layout(arena)` tells how much memory a worker needs, `element` what the products are of.
template <typename element, typename Layout, typename Work>
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
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const uintptr_t start = (base + worker * bytes + 63) / 64 * 64;
      for (int64_t unit = next++; unit < units; unit = next++)
        work(unit, Arena(start));
    }
    end_products<element>();
  });
}

}  // namespace diffattn

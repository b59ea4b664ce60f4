// Decoding: a few queries over a long cache. Every key and value is read once, by whichever thread takes its span of
// keys; the spans' results are joined by their maxima and sums. With so few rows the product with v is done for both
// maps (it costs no memory traffic), so each span needs no normaliser and the subtraction waits until the end.
//
// The rows of a group, of signal and of noise maps: for each noise head and query those of its signal heads, then its
// own. Two neighbours are computed together, in V1 and V2 those of both maps.
#include "forward.h"

#include <vector>

namespace diffattn {
namespace {

constexpr int64_t kSpan = 512;        // keys of a unit: independent of the threads, so that results are too
constexpr int64_t kChunk = 32;        // keys whose scores are computed together
constexpr int64_t kJoined = 1 << 16;  // numbers that are worth another thread when the spans are joined

// What a span of keys adds to a row of one map: maximum (times log2_scale), sum and Dv sums of values.
struct Partial {
  float* data;
  int64_t width;

  float* at(int64_t row) const {
    return data + row * width;
  }
};

// Rows of a group, one more where they are odd, whose query is zeros and whose result is not read.
inline int64_t rows_of_group(const Problem& p) {
  return (p.noise * p.T * (p.signals + 1) + 1) / 2 * 2;
}

inline int64_t padded(int64_t width) {
  return (width + kLanes - 1) / kLanes * kLanes;
}

// Scores of two rows for four keys. The halves of a pair of keys may lie side by side in one row of the
// cache, which is read from end to end: memory that is skipped over comes at half the rate.
template <typename scalar>
void dots_of_4(
    const float* query1, const float* query2, const scalar* keys1, const scalar* keys2, int64_t row1, int64_t row2,
    int64_t width, float* to1, float* to2) {
  auto dot = [width](const float* query, const scalar* key) {
    Floats total = splat(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      total += load(query + i) * load(key + i);
    return i < width ? total + load(query + i) * load_part(key + i, width - i) : total;
  };
  Floats a[4], b[4];
#pragma GCC unroll 4
  for (int64_t key = 0; key < 4; ++key) {
    a[key] = dot(query1, keys1 + key * row1);
    b[key] = dot(query2, keys2 + key * row2);
  }
  sums_of_4(a[0], a[1], a[2], a[3], to1);
  sums_of_4(b[0], b[1], b[2], b[3], to2);
}

// The same for any number of keys; the last four overlap those before them.
template <typename scalar>
void dots(
    const float* query1, const float* query2, const scalar* keys1, const scalar* keys2, int64_t row1, int64_t row2,
    int64_t count, int64_t width, float* to1, float* to2) {
  if (count < 4) {
    for (int64_t i = 0; i < count; ++i) {
      float padded1[4], padded2[4];
      dots_of_4(query1, query2, keys1 + i * row1, keys2 + i * row2, 0, 0, width, padded1, padded2);
      to1[i] = padded1[0];
      to2[i] = padded2[0];
    }
    return;
  }
  for (int64_t next = 0; next < count; next += 4) {
    const int64_t i = std::min(next, count - 4);
    dots_of_4(query1, query2, keys1 + i * row1, keys2 + i * row2, row1, row2, width, to1 + i, to2 + i);
  }
}

// Adds `count` values, weighted by the rows `p` and `q` of maps, to two rows of output: `columns` vectors of it.
template <int columns, typename scalar>
void weigh_columns(
    const scalar* values, int64_t row, int64_t count, int64_t width, const float* p, const float* q, float* o1,
    float* o2) {
  // The sums of a chunk, which are then added to those before it: one long chain of additions would round more.
  Floats a[columns] = {}, b[columns] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const scalar* at = values + i * row + j * kLanes;
      // Only a lone vector can be the last and end within.
      const Floats value = columns > 1 ? load(at) : load_part(at, width);
      a[j] += value * p[i];
      b[j] += value * q[i];
    }
  for (int64_t j = 0; j < columns; ++j) {
    store(o1 + j * kLanes, load(o1 + j * kLanes) + a[j]);
    store(o2 + j * kLanes, load(o2 + j * kLanes) + b[j]);
  }
}

// As many columns at a time as the registers hold, so that a value's row is read from end to end.
template <typename scalar>
void weigh(
    const scalar* values, int64_t row, int64_t count, int64_t width, const float* p, const float* q, float* o1,
    float* o2) {
  int64_t at = 0;
  auto step = [&]<int columns>(std::integral_constant<int, columns>) {
    for (; at + (columns > 1 ? columns * kLanes : 1) <= width; at += columns * kLanes)
      weigh_columns<columns>(values + at, row, count, width - at, p, q, o1 + at, o2 + at);
  };
  step(std::integral_constant<int, 8>());
  step(std::integral_constant<int, 4>());
  step(std::integral_constant<int, 1>());
}

template <typename scalar>
class Worker {
 public:
  Worker(const Forward<scalar>& f, Arena& arena)
      : f_(f),
        p_(f.p),
        rows_(f.p.noise * f.p.T * (f.p.signals + 1)),
        queries_(arena.take<float>(rows_of_group(f.p) * padded(f.p.D))),
        scores_(arena.take<float>(rows_of_group(f.p) * kChunk)) {}

  void span(int64_t b, int64_t g, Range keys, const Partial& partial) {
    load_queries(b, g);
    for (int64_t row = 0; row < rows_of_group(p_); ++row) {
      float* to = partial.at(row);
      std::fill_n(to, partial.width, 0.0f);
      to[0] = -kInfinity;
    }
    for (int64_t start = keys.begin; start < keys.end; start += kChunk) {
      const int64_t count = std::min(kChunk, keys.end - start);
      for (int64_t row = 0; row < rows_; row += 2) {
        float* scores = scores_ + row * kChunk;
        const float* query = queries_ + row * padded(p_.D);
        const auto &keys1 = keys_of(row), &keys2 = keys_of(row + 1);
        dots(
            query, query + padded(p_.D), keys1.at(b, start, g), keys2.at(b, start, g), keys1.row, keys2.row, count,
            p_.D, scores, scores + kChunk);
        for (int64_t i = row; i < std::min(row + 2, rows_); ++i)
          weights(b, query_of(i), start, count, scores_ + i * kChunk, partial.at(i));
      }
      for (int64_t row = 0; row < rows_; row += 2)
        weigh(
            f_.v.at(b, start, g), f_.v.row, count, p_.Dv, scores_ + row * kChunk, scores_ + (row + 1) * kChunk,
            partial.at(row) + kLanes, partial.at(row + 1) + kLanes);
    }
  }

 private:
  bool is_noise(int64_t row) const {
    return row % (p_.signals + 1) == p_.signals;
  }

  const View<const scalar>& keys_of(int64_t row) const {
    return is_noise(row) ? f_.k2 : f_.k1;
  }

  int64_t query_of(int64_t row) const {
    return row / (p_.signals + 1) % p_.T;
  }

  void load_queries(int64_t b, int64_t g) {
    const int64_t width = padded(p_.D);
    std::fill_n(queries_, rows_of_group(p_) * width, 0.0f);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t t = query_of(row), noise = g * p_.noise + row / (p_.signals + 1) / p_.T;
      const scalar* from = is_noise(row) ? f_.q2.at(b, t, noise)
                                         : f_.q1.at(b, t, noise * p_.signals + row % (p_.signals + 1));
      for (int64_t i = 0; i < p_.D; ++i)
        queries_[row * width + i] = double(from[i]) * p_.log2_scale;
    }
  }

  // Scores become exponentials against the running maximum; the row's sum and its sums of values follow it.
  void weights(int64_t b, int64_t t, int64_t start, int64_t count, float* scores, float* row) {
    if (p_.queries || (p_.causal && start + count - 1 - (p_.S - p_.T) > t))
      for (int64_t i = 0; i < count; ++i) {
        const Range seen = p_.queries_of(b, start + i);
        if (t < seen.begin || t >= seen.end)
          scores[i] = -kInfinity;
      }
    std::fill(scores + count, scores + kChunk, -kInfinity);
    Floats high = load(scores);
    for (int64_t i = kLanes; i < kChunk; i += kLanes)
      high = maximum(load(scores + i), high);
    float highest = row[0];
    for (int lane = 0; lane < kLanes; ++lane)
      highest = std::max(highest, float(high[lane]));
    const float level = highest == -kInfinity ? 0.0f : highest;
    if (highest > row[0]) {
      const float factor = exp2<6>(splat(row[0] - level))[0];
      row[1] *= factor;
      for (int64_t i = 0; i < padded(p_.Dv); i += kLanes)
        store(row + kLanes + i, load(row + kLanes + i) * factor);
      row[0] = highest;
    }
    Floats total = splat(0.0f);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const Floats e = exp2<exp_degree<scalar>>(load(scores + i) - level);
      store(scores + i, e);
      total += e;
    }
    row[1] += sum(total);
  }

  const Forward<scalar>& f_;
  const Problem& p_;
  int64_t rows_;  // without the odd one
  float *queries_, *scores_;
};

// RMSNorm of a row whose padding is zeros.
void normalise(const Norm& norm, int64_t width, float* o) {
  Floats squares = splat(0.0f);
  for (int64_t i = 0; i < width; i += kLanes)
    squares += load(o + i) * load(o + i);
  const float factor = norm.scale / std::sqrt(sum(squares) / width + norm.eps);
  for (int64_t i = 0; i < width; ++i)
    o[i] *= norm.gain ? factor * norm.gain[i] : factor;
}

// The spans of one output row, number `row` of head, then query, of its group: o1 / l1 − λ o2 / l2, normalised where
// there is a norm.
template <typename scalar>
void join(
    const Forward<scalar>& f, const Norm* norm, int64_t b, int64_t g, int64_t row, int64_t spans,
    const Partial& partial, float* o) {
  const Problem& p = f.p;
  const int64_t head = row / p.T, t = row % p.T, h = g * p.noise * p.signals + head;
  const int64_t first = (head / p.signals * p.T + t) * (p.signals + 1);
  const int64_t rows[2] = {first + head % p.signals, first + p.signals};
  const float factors[2] = {1.0f, -*f.lam.at(b, t, h)};
  std::fill_n(o, padded(p.Dv), 0.0f);
  for (int64_t map : {0, 1}) {
    auto at = [&](int64_t span) { return partial.at(span * rows_of_group(p) + rows[map]); };
    float highest = -kInfinity, total = 0.0f;
    for (int64_t span = 0; span < spans; ++span)
      highest = std::max(highest, at(span)[0]);
    const bool empty = highest == -kInfinity;
    for (int64_t span = 0; span < spans && !empty; ++span)
      total += at(span)[1] * std::exp2(at(span)[0] - highest);
    f.keep(map, b, h, t, empty ? 0.0f : highest / p.log2_scale, empty ? 0.0f : 1.0f / total);
    for (int64_t span = 0; span < spans && !empty; ++span) {
      const float factor = factors[map] / total * std::exp2(at(span)[0] - highest);
      for (int64_t i = 0; i < padded(p.Dv); i += kLanes)
        store(o + i, load(o + i) + load(at(span) + kLanes + i) * factor);
    }
  }
  if (norm)
    normalise(*norm, p.Dv, o);
  scalar* to = f.output.at(b, t, h);
  for (int64_t i = 0; i < p.Dv; ++i)
    to[i] = scalar(o[i]);
}

}  // namespace

template <typename scalar>
void run_decoding(const Forward<scalar>& f, const Norm* norm) {
  const Problem& p = f.p;
  const int64_t rows = rows_of_group(p), groups = p.B * p.G, width = kLanes + padded(p.Dv);
  const int64_t spans = std::max<int64_t>(1, (p.S + kSpan - 1) / kSpan);
  const at::Tensor partials = at::empty({groups, spans, rows, width}, at::kFloat);
  float* data = partials.data_ptr<float>();
  share<float>(
      groups * spans, [&](Arena& arena) { Worker<scalar>(f, arena); },
      [&](int64_t unit, Arena arena) {
        const int64_t b = unit / spans / p.G, g = unit / spans % p.G, start = unit % spans * kSpan;
        const Range keys = visible(p, b, 0, p.T - 1, {start, std::min(start + kSpan, p.S)});
        Worker<scalar>(f, arena).span(b, g, keys, {data + unit * rows * width, width});
      });
  // Waking the threads once more takes longer than this does on one, but for long caches of large batches.
  parallel_for(groups, std::max<int64_t>(1, 2 * kJoined / (spans * rows * width)), [&](int64_t begin, int64_t end) {
    std::vector<float> o(padded(p.Dv));
    for (int64_t unit = begin; unit < end; ++unit)
      for (int64_t row = 0; row < p.noise * p.signals * p.T; ++row)
        join(f, norm, unit / p.G, unit % p.G, row, spans, {data + unit * spans * rows * width, width}, o.data());
  });
}

template void run_decoding(const Forward<float>&, const Norm*);
template void run_decoding(const Forward<at::Half>&, const Norm*);
template void run_decoding(const Forward<at::BFloat16>&, const Norm*);

}  // namespace diffattn

// Forward: a block of query rows holds the exponentials of both its rows of scores (keys × rows, so that a lane is a
// query and no sum runs across lanes), gets both normalisers, subtracts tile by tile, and multiplies by v once.
//
//   for each tile of keys    s = k qᵀ;  m = running maximum;  e = 2^(c (s − m));  l = running sum of e
//   for each tile of keys    p = e1 · f1 − e2 · f2,  f1 = 2^(c (m_tile − m)) / l1,  f2 = λ 2^(c (m_tile − m)) / l2
//                            oᵀ += vᵀ p
//
// Where output heads share a noise head, its exponentials and sums serve them one after another.
//
// A tile of scores stays in the first caches for its maxima and exponentials; only the exponentials are written to the
// block's rows, and read once more by the subtraction.
#include "forward.h"

namespace diffattn {
namespace {

// One of the two maps of a block of rows.
template <int rows>
struct Map {
  float* e;      // (S, rows) exponentials, relative to the maximum at their tile
  float* level;  // (tiles, rows) that maximum
  float* m;      // (rows) running maximum of the scores
  float* l;      // (rows) running sum

  Map(Arena& arena, const Problem& p)
      : e(arena.take<float>(p.S * rows)),
        level(arena.take<float>(p.tiles() * rows)),
        m(arena.take<float>(rows)),
        l(arena.take<float>(rows)) {}
};

// The exponentials of a tile of m rows of scores, and the running maximum and sum. Scores are subtracted from the
// maximum before they are scaled: the largest gives 1, exactly, however large it is.
template <typename scalar, int rows>
void exponentials(const Problem& p, const float* scores, Map<rows>& map, int64_t tile, int64_t m, bool first) {
  constexpr int columns = rows / kLanes, group = columns < 4 ? columns : 4, degree = exp_degree<scalar>;
  const Powers<scalar> power(p);
  float* e = map.e + tile * p.tile * rows;
  // As many columns at a time as the registers hold.
  for (int lane = 0; lane < rows; lane += group * kLanes) {
    Floats highest[group], level[group];
    for (int c = 0; c < group; ++c)
      highest[c] = first ? splat(-kInfinity) : load(map.m + lane + c * kLanes);
    for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < group; ++c)
        highest[c] = maximum(load(scores + i * rows + lane + c * kLanes), highest[c]);
    for (int c = 0; c < group; ++c) {
      const int at = lane + c * kLanes;
      // A lane that has seen no key yet has no maximum: its exponentials are 2^−inf = 0 against any level.
      level[c] = highest[c] == -kInfinity ? splat(0.0f) : highest[c];
      const Floats before = first ? splat(0.0f) : load(map.l + at);
      const Floats factor = first ? before : exp2<degree>(power(load(map.m + at) - level[c]));
      store(map.l + at, before * factor);
      store(map.level + tile * rows + at, level[c]);
      store(map.m + at, highest[c]);
    }
    // Sums of sixteen, then of those: one long chain of additions would be the largest error of a row's maps.
    for (int64_t begin = 0; begin < m; begin += 16) {
      Floats total[group] = {};
      for (int64_t i = begin; i < std::min(begin + 16, m); ++i)
#pragma GCC unroll 4
        for (int c = 0; c < group; ++c) {
          const int64_t j = i * rows + lane + c * kLanes;
          const Floats x = exp2<degree>(power(load(scores + j) - level[c]));
          store(e + j, x);
          total[c] += x;
        }
      for (int c = 0; c < group; ++c)
        store(map.l + lane + c * kLanes, load(map.l + lane + c * kLanes) + total[c]);
    }
  }
}

template <typename scalar, typename element, int rows>
class Worker {
 public:
  Worker(const Forward<scalar>& f, Arena& arena)
      : f_(f),
        p_(f.p),
        signal_(arena, f.p),
        noise_(arena, f.p),
        scores_(arena.take<float>(f.p.tile * rows)),
        q1_(arena.take<element>(f.p.D * rows)),
        q2_(arena.take<element>(f.p.D * rows)),
        k1_(arena.take<element>(f.p.S * f.p.D)),
        k2_(f.p.one_key ? k1_ : arena.take<element>(f.p.S * f.p.D)),
        difference_(arena.take<element>(f.p.tile * rows)),
        o_(arena.take<float>(f.p.Dv * rows)),
        v_(arena.take<element>(f.p.tiles() * f.p.tile * f.p.Dv)),
        inverse_(arena.take<float>(rows)) {}

  // The keys of a group, one behind the other: where they lie, rows are a whole token apart, each on a page of its own.
  void load_keys(int64_t b, int64_t g) {
    rows_behind(f_.k1, b, g, 0, p_.S, p_.D, k1_);
    if (!p_.one_key)
      rows_behind(f_.k2, b, g, 0, p_.S, p_.D, k2_);
  }

  // Its values, transposed: one tile (Dv × tile) after another, zeros behind the last key.
  void load_values(int64_t b, int64_t g) {
    auto at = [&](int64_t s) { return s < p_.S ? f_.v.at(b, s, g) : nullptr; };
    element* to = v_;
    for (int64_t start = 0; start < p_.S; start += p_.tile, to += p_.Dv * p_.tile) {
      auto row = [&](int64_t i, int64_t word, int64_t count) {
        if constexpr (kPair<element> == 2) {
          const scalar *even = at(start + 2 * i), *odd = at(start + 2 * i + 1);
          return pairs(even ? even + word : nullptr, odd ? odd + word : nullptr, count);
        } else {
          return words_of<element>(at(start + i), word, count);
        }
      };
      const int64_t columns = p_.tile / kPair<element>;
      transpose_words(row, columns, p_.Dv, reinterpret_cast<uint32_t*>(to), columns);
    }
  }

  void block(int64_t b, int64_t g, int64_t index) {
    const Lanes<rows> lanes(p_, g, index);
    const Range keys = visible(p_, b, lanes.t_min, lanes.t_max, {0, p_.S});
    const int64_t begin = keys.begin / p_.tile, end = (keys.end + p_.tile - 1) / p_.tile;
    if (keys.begin == keys.end)
      return clear(b, lanes);
    pack_columns<element, rows>(rows_at(f_.q2, b, lanes, 1, 0), p_.D, q2_);
    for (int64_t signal = 0; signal < p_.signals; ++signal) {
      pack_columns<element, rows>(rows_at(f_.q1, b, lanes, p_.signals, signal), p_.D, q1_);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t start = tile * p_.tile, m = tile_rows(p_, tile, keys.end);
        score_tile<element>(p_, {k1_ + start * p_.D, p_.D}, b, start, m, lanes, q1_, scores_);
        exponentials<scalar>(p_, scores_, signal_, tile, m, tile == begin);
        if (signal > 0)
          continue;
        score_tile<element>(p_, {k2_ + start * p_.D, p_.D}, b, start, m, lanes, q2_, scores_);
        exponentials<scalar>(p_, scores_, noise_, tile, m, tile == begin);
      }
      normalise(b, lanes, signal);
      // Backwards: the tiles computed last are the ones still in the caches.
      for (int64_t tile = end - 1; tile >= begin; --tile) {
        const int64_t m = tile_rows(p_, tile, keys.end);
        subtract(tile, m);
        multiply(
            p_.Dv, rows, whole_pairs<element>(m), v_ + tile * p_.tile * p_.Dv, p_.tile, difference_, rows, o_, rows,
            tile != end - 1);
      }
      write(b, lanes, signal);
    }
  }

 private:
  void clear(int64_t b, const Lanes<rows>& lanes) {
    for (int64_t lane = 0; lane < lanes.count; ++lane)
      for (int64_t h = lanes.head[lane] * p_.signals; h < (lanes.head[lane] + 1) * p_.signals; ++h) {
        scalar* to = f_.output.at(b, lanes.t[lane], h);
        std::fill(to, to + p_.Dv, scalar(0.0f));
        for (int map : {0, 1})
          f_.keep(map, b, h, lanes.t[lane], 0.0f, 0.0f);
      }
  }

  // A running sum as 1 / l, and the maximum as a number.
  static float inverse_of(Map<rows>& map, int64_t lane) {
    const bool empty = map.m[lane] == -kInfinity;
    map.m[lane] = empty ? 0.0f : map.m[lane];
    return empty ? 0.0f : 1.0f / map.l[lane];
  }

  // Turns the running sums into factors 1 / l and λ / l, and keeps what the backward pass makes the maps of.
  void normalise(int64_t b, const Lanes<rows>& lanes, int64_t signal) {
    for (int64_t lane = 0; lane < rows; ++lane) {
      const int64_t h = lanes.head[lane] * p_.signals + signal, t = lanes.t[lane];
      if (signal == 0)
        inverse_[lane] = inverse_of(noise_, lane);
      signal_.l[lane] = inverse_of(signal_, lane);
      noise_.l[lane] = *f_.lam.at(b, t, h) * inverse_[lane];
      if (lane < lanes.count) {
        f_.keep(0, b, h, t, signal_.m[lane], signal_.l[lane]);
        f_.keep(1, b, h, t, noise_.m[lane], inverse_[lane]);
      }
    }
  }

  // The differential map of a tile, in bfloat16 in pairs of keys.
  void subtract(int64_t tile, int64_t m) {
    constexpr int columns = rows / kLanes, group = columns < 4 ? columns : 4;
    const float *signal = signal_.e + tile * p_.tile * rows, *noise = noise_.e + tile * p_.tile * rows;
    for (int lane = 0; lane < rows; lane += group * kLanes) {
      Floats f1[group], f2[group];
      for (int c = 0; c < group; ++c) {
        f1[c] = factor(signal_, tile, lane + c * kLanes);
        f2[c] = factor(noise_, tile, lane + c * kLanes);
      }
      auto difference = [&](int64_t i, int c) {
        const int64_t j = i * rows + lane + c * kLanes;
        return load(signal + j) * f1[c] - load(noise + j) * f2[c];
      };
      for (int64_t i = 0; i < m; i += kPair<element>)
#pragma GCC unroll 4
        for (int c = 0; c < group; ++c) {
          element* to = difference_ + i * rows + (lane + c * kLanes) * kPair<element>;
          if constexpr (kPair<element> == 2)
            store_pairs(to, difference(i, c), i + 1 < m ? difference(i + 1, c) : splat(0.0f));
          else
            store(to, difference(i, c));
        }
    }
  }

  // What the exponentials of a tile are multiplied by, since their maximum was another.
  Floats factor(const Map<rows>& map, int64_t tile, int lane) const {
    const Floats fell = load(map.level + tile * rows + lane) - load(map.m + lane);
    return exp2<exp_degree<scalar>>(Powers<scalar>(p_)(fell)) * load(map.l + lane);
  }

  void write(int64_t b, const Lanes<rows>& lanes, int64_t signal) {
    for (int64_t first = 0; first < lanes.count; first += kLanes)
      for (int64_t i = 0; i < p_.Dv; i += kLanes) {
        Words x[kLanes];
        for (int64_t j = 0; j < kLanes; ++j)
          x[j] = i + j < p_.Dv ? (Words)load(o_ + (i + j) * rows + first) : Words{};
        transpose(x);
        for (int64_t lane = first; lane < std::min<int64_t>(first + kLanes, lanes.count); ++lane)
          store_part(
              f_.output.at(b, lanes.t[lane], lanes.head[lane] * p_.signals + signal) + i, (Floats)x[lane - first],
              p_.Dv - i);
      }
  }

  const Forward<scalar>& f_;
  const Problem& p_;
  Map<rows> signal_, noise_;
  float* scores_;
  element *q1_, *q2_, *k1_, *k2_, *difference_;
  float* o_;
  element* v_;
  float* inverse_;  // (rows) 1 / the sum of the noise map's exponentials
};

template <typename scalar, typename element, int rows>
void run(const Forward<scalar>& f) {
  const Problem& p = f.p;
  const int64_t blocks = Lanes<rows>::blocks(p), groups = p.B * p.G, threads = at::get_num_threads();
  // Every part of a group transposes the values again, so a group is cut only where threads would be idle. Parts take
  // every n-th block: under a causal mask later blocks see more keys.
  const bool even = groups % threads == 0 || groups >= 4 * threads;
  const int64_t parts = std::min(blocks, even ? 1 : (4 * threads + groups - 1) / groups);
  share<element>(
      groups * parts, [&](Arena& arena) { Worker<scalar, element, rows>(f, arena); },
      [&](int64_t unit, Arena arena) {
        Worker<scalar, element, rows> worker(f, arena);
        const int64_t b = unit / parts / p.G, g = unit / parts % p.G;
        worker.load_keys(b, g);
        worker.load_values(b, g);
        for (int64_t block = blocks - 1 - unit % parts; block >= 0; block -= parts)
          worker.block(b, g, block);
      });
}

}  // namespace

template <typename scalar, typename element>
void run_forward(const Forward<scalar>& f) {
  const int64_t lanes = f.p.T >= 64 ? 64 : f.p.noise * f.p.T;
  if (lanes > 32)
    run<scalar, element, 64>(f);
  else if (lanes > 16)
    run<scalar, element, 32>(f);
  else
    run<scalar, element, 16>(f);
}

template void run_forward<float, float>(const Forward<float>&);
template void run_forward<at::Half, float>(const Forward<at::Half>&);
template void run_forward<at::BFloat16, float>(const Forward<at::BFloat16>&);
#if DIFFATTN_BFLOAT16_PRODUCTS
template void run_forward<at::BFloat16, at::BFloat16>(const Forward<at::BFloat16>&);
#endif

}  // namespace diffattn

// Forward: a block of query rows holds the exponentials of both its rows of scores (keys × rows, so that a lane is a
// query and no sum runs across lanes), gets both normalisers, subtracts tile by tile, and multiplies by v once.
//
//   for each tile of keys    s = k qᵀ;  m = running maximum;  e = 2^(c s − m);  l = running sum of e
//   for each tile of keys    p = e1 · f1 − e2 · f2,  f1 = 2^(m_tile − m) / l1,  f2 = λ 2^(m_tile − m) / l2
//                            oᵀ += vᵀ p
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
  float* level;  // (tiles, rows) that maximum, times log2_scale
  float* m;      // (rows) running maximum of the scores
  float* l;      // (rows) running sum

  Map(Arena& arena, const Problem& p)
      : e(arena.take<float>(p.S * rows)),
        level(arena.take<float>(p.tiles() * rows)),
        m(arena.take<float>(rows)),
        l(arena.take<float>(rows)) {}
};

// The exponentials of a tile of m rows of scores, and the running maximum and sum.
template <int rows, int degree>
void exponentials(const Problem& p, const float* scores, Map<rows>& map, int64_t tile, int64_t m, bool first) {
  constexpr int columns = rows / kLanes;
  Floats highest[columns], level[columns], total[columns] = {};
  for (int c = 0; c < columns; ++c)
    highest[c] = first ? splat(-kInfinity) : load(map.m + c * kLanes);
  for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c)
      highest[c] = maximum(load(scores + i * rows + c * kLanes), highest[c]);
  for (int c = 0; c < columns; ++c) {
    const int lane = c * kLanes;
    // A lane that has seen no key yet has no maximum: its exponentials are 2^−inf = 0 against any level.
    level[c] = highest[c] == -kInfinity ? splat(0.0f) : highest[c] * p.log2_scale;
    if (first) {
      store(map.l + lane, splat(0.0f));
    } else {
      const Floats before = load(map.m + lane);
      const Floats old = before == -kInfinity ? splat(-kInfinity) : before * p.log2_scale;
      store(map.l + lane, load(map.l + lane) * exp2<degree>(old - level[c]));
    }
    store(map.level + tile * rows + lane, level[c]);
    store(map.m + lane, highest[c]);
  }
  float* e = map.e + tile * p.tile * rows;
  for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) {
      const int64_t j = i * rows + c * kLanes;
      const Floats x = exp2<degree>(load(scores + j) * p.log2_scale - level[c]);
      store(e + j, x);
      total[c] += x;
    }
  for (int c = 0; c < columns; ++c)
    store(map.l + c * kLanes, load(map.l + c * kLanes) + total[c]);
}

template <typename scalar, int rows>
class Worker {
 public:
  Worker(const Forward<scalar>& f, Arena& arena)
      : f_(f),
        p_(f.p),
        signal_(arena, f.p),
        noise_(arena, f.p),
        scores_(arena.take<float>(f.p.tile * rows)),
        q1_(arena.take<scalar>(f.p.D * rows)),
        q2_(arena.take<scalar>(f.p.D * rows)),
        difference_(arena.take<scalar>(f.p.tile * rows)),
        o_(arena.take<float>(f.p.Dv * rows)),
        v_(arena.take<scalar>(f.p.tiles() * f.p.tile * f.p.Dv)) {}

  // The values of a group, transposed: one tile (Dv × tile) after another, zeros behind the last key.
  void load_values(int64_t b, int64_t g) {
    auto at = [&](int64_t s) { return s < p_.S ? f_.v.at(b, s, g) : nullptr; };
    scalar* to = v_;
    for (int64_t start = 0; start < p_.S; start += p_.tile, to += p_.Dv * p_.tile) {
      auto row = [&](int64_t i, int64_t word, int64_t count) {
        if constexpr (kPair<scalar> == 2) {
          const scalar *even = at(start + 2 * i), *odd = at(start + 2 * i + 1);
          return pairs(even ? even + word : nullptr, odd ? odd + word : nullptr, count);
        } else {
          const scalar* from = at(start + i);
          return from ? load_words(from + word, count) : Words{};
        }
      };
      const int64_t columns = p_.tile / kPair<scalar>;
      transpose_words(row, columns, p_.Dv, reinterpret_cast<uint32_t*>(to), columns);
    }
  }

  void block(int64_t b, int64_t g, int64_t index) {
    const Lanes<rows> lanes(p_, g, index);
    const Range keys = visible(p_, b, lanes.t_min, lanes.t_max);
    const int64_t begin = keys.begin / p_.tile, end = (keys.end + p_.tile - 1) / p_.tile;
    if (begin == end)
      return clear(b, lanes);
    pack_columns(f_.q1, b, lanes, p_.D, q1_);
    pack_columns(f_.q2, b, lanes, p_.D, q2_);
    constexpr int degree = exp_degree<scalar>;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tile * p_.tile, m = tile_rows(p_, tile, keys.end);
      score_tile(p_, f_.k1, b, g, start, m, lanes, q1_, scores_);
      exponentials<rows, degree>(p_, scores_, signal_, tile, m, tile == begin);
      score_tile(p_, f_.k2, b, g, start, m, lanes, q2_, scores_);
      exponentials<rows, degree>(p_, scores_, noise_, tile, m, tile == begin);
    }
    normalise(b, lanes);
    // Backwards: the tiles computed last are the ones still in the caches.
    for (int64_t tile = end - 1; tile >= begin; --tile) {
      const int64_t m = tile_rows(p_, tile, keys.end);
      subtract(tile, m);
      multiply(
          p_.Dv, rows, whole_pairs<scalar>(m), v_ + tile * p_.tile * p_.Dv, p_.tile, difference_, rows, o_, rows,
          tile != end - 1);
    }
    write(b, lanes);
  }

 private:
  void clear(int64_t b, const Lanes<rows>& lanes) {
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      scalar* to = f_.output.at(b, lanes.t[lane], lanes.head[lane]);
      std::fill(to, to + p_.Dv, scalar(0.0f));
      for (int map : {0, 1})
        f_.keep(map, b, lanes.head[lane], lanes.t[lane], kInfinity);
    }
  }

  // Turns the running sums into factors 1 / l and λ / l, the maxima into levels, and keeps the log-sum-exps.
  void normalise(int64_t b, const Lanes<rows>& lanes) {
    for (int64_t lane = 0; lane < rows; ++lane) {
      const int64_t h = lanes.head[lane], t = lanes.t[lane];
      const float factors[2] = {1.0f, *f_.lam.at(b, t, h)};
      for (int index : {0, 1}) {
        Map<rows>& map = index ? noise_ : signal_;
        const bool empty = map.m[lane] == -kInfinity;
        map.m[lane] = empty ? 0.0f : map.m[lane] * p_.log2_scale;
        if (lane < lanes.count)
          f_.keep(index, b, h, t, empty ? kInfinity : map.m[lane] + std::log2(double(map.l[lane])));
        map.l[lane] = empty ? 0.0f : factors[index] / map.l[lane];
      }
    }
  }

  // The differential map of a tile, in bfloat16 in pairs of keys.
  void subtract(int64_t tile, int64_t m) {
    constexpr int degree = exp_degree<scalar>, columns = rows / kLanes;
    const float *signal = signal_.e + tile * p_.tile * rows, *noise = noise_.e + tile * p_.tile * rows;
    Floats f1[columns], f2[columns];
    for (int c = 0; c < columns; ++c) {
      const int64_t lane = c * kLanes, at = tile * rows + lane;
      f1[c] = exp2<degree>(load(signal_.level + at) - load(signal_.m + lane)) * load(signal_.l + lane);
      f2[c] = exp2<degree>(load(noise_.level + at) - load(noise_.m + lane)) * load(noise_.l + lane);
    }
    auto difference = [&](int64_t i, int c) {
      const int64_t j = i * rows + c * kLanes;
      return i < m ? load(signal + j) * f1[c] - load(noise + j) * f2[c] : splat(0.0f);
    };
    for (int64_t i = 0; i < m; i += kPair<scalar>)
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        scalar* to = difference_ + i * rows + c * kLanes * kPair<scalar>;
        if constexpr (kPair<scalar> == 2)
          store_pairs(to, difference(i, c), difference(i + 1, c));
        else
          store(to, difference(i, c));
      }
  }

  void write(int64_t b, const Lanes<rows>& lanes) {
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      scalar* to = f_.output.at(b, lanes.t[lane], lanes.head[lane]);
      for (int64_t i = 0; i < p_.Dv; ++i)
        to[i] = scalar(o_[i * rows + lane]);
    }
  }

  const Forward<scalar>& f_;
  const Problem& p_;
  Map<rows> signal_, noise_;
  float* scores_;
  scalar *q1_, *q2_, *difference_;
  float* o_;
  scalar* v_;
};

template <typename scalar, int rows>
void run(const Forward<scalar>& f) {
  const Problem& p = f.p;
  const int64_t blocks = Lanes<rows>::blocks(p), groups = p.B * p.G, threads = at::get_num_threads();
  // Every part of a group transposes the values again, so a group is cut only where threads would be idle. Parts take
  // every n-th block: under a causal mask later blocks see more keys.
  const bool even = groups % threads == 0 || groups >= 4 * threads;
  const int64_t parts = std::min(blocks, even ? 1 : (4 * threads + groups - 1) / groups);
  share(
      groups * parts, [&](Arena& arena) { Worker<scalar, rows>(f, arena); },
      [&](int64_t unit, Arena arena) {
        Worker<scalar, rows> worker(f, arena);
        const int64_t b = unit / parts / p.G, g = unit / parts % p.G;
        worker.load_values(b, g);
        for (int64_t block = blocks - 1 - unit % parts; block >= 0; block -= parts)
          worker.block(b, g, block);
      });
}

}  // namespace

template <typename scalar>
void run_forward(const Forward<scalar>& f) {
  const int64_t lanes = f.p.T >= 64 ? 64 : f.p.R * f.p.T;
  if (lanes > 32)
    run<scalar, 64>(f);
  else if (lanes > 16)
    run<scalar, 32>(f);
  else
    run<scalar, 16>(f);
}

template void run_forward(const Forward<float>&);
template void run_forward(const Forward<at::BFloat16>&);

}  // namespace diffattn

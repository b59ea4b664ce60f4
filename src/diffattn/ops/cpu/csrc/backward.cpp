// Backward: the maps are recomputed from the saved maxima and sums, tile by tile (keys × rows, a lane is a query).
//
//   for each tile    A1 = 2^(c (k1 q1ᵀ − m1)) / l1,  A2 likewise,  dP = v d_oᵀ;  D1 += A1 ∘ dP,  D2 += A2 ∘ dP
//   for each tile    P = A1 − λ A2,  dS1 = scale A1 ∘ (dP − D1),  dS2 = −scale λ A2 ∘ (dP − D2)
//                    d_v += P d_o,  d_k1 += dS1 q1,  d_k2 += dS2 q2,  d_q1 += dS1ᵀ k1,  d_q2 += dS2ᵀ k2
//
// Output heads that share a noise head are taken one after another: A2 is made with the first of them, and with the
// last one dS2 = −scale A2 ∘ Σ λ (dP − D2), a sum over them, and what is made of it.
//
// D1 and D2 are sums over all keys of a row and neither is a function of the saved output (only D1 − λ D2 is), so a
// block of rows holds its tiles of A1, A2 and dP until both are known. The gradients of keys and values are summed in
// float32: in place in float32, in memory of the worker in half precision. Where that memory would be large, only a span of
// the keys is summed at a time; the blocks that see an earlier span return to it with D1 and D2 known.
#include "backward.h"

namespace diffattn {
namespace {

constexpr int64_t kSums = 2 << 20;  // bytes of a worker's sums, where it has its own

template <typename scalar, typename element, int rows>
class Worker {
 public:
  Worker(const Backward<scalar>& f, Arena& arena, int64_t span)
      : f_(f),
        p_(f.p),
        a1_(arena.take<element>(f.p.S * rows)),
        a2_(arena.take<element>(f.p.S * rows)),
        dp_(arena.take<element>(f.p.S * rows)),
        scores_(arena.take<float>(std::max(3 * f.p.tile * rows, 5 * f.p.tile * rows * int64_t(sizeof(element)) / 4))),
        weighted_(arena.take<float>(f.p.signals > 1 ? f.p.S * rows : 0)),
        tile_(reinterpret_cast<element*>(scores_)),
        k_(arena.take<element>(f.p.tile * std::max(f.p.D, f.p.Dv))),
        q1_columns_(arena.take<element>(f.p.D * rows)),
        q2_columns_(arena.take<element>(f.p.D * rows)),
        do_columns_(arena.take<element>(f.p.Dv * rows)),
        // Columns are done with before the rows are needed, unless a block returns to a span.
        q1_rows_(span < f.p.S ? arena.take<element>(f.p.D * rows) : q1_columns_),
        q2_rows_(span < f.p.S ? arena.take<element>(f.p.D * rows) : q2_columns_),
        do_rows_(span < f.p.S ? arena.take<element>(f.p.Dv * rows) : do_columns_),
        dq1_(arena.take<float>(f.p.D * rows)),
        dq2_(arena.take<float>(f.p.D * rows)),
        m1_(arena.take<float>(rows)),
        m2_(arena.take<float>(rows)),
        inverse1_(arena.take<float>(rows)),
        inverse2_(arena.take<float>(rows)),
        lam_(arena.take<float>(rows)),
        d1_(arena.take<float>(rows)),
        d2_(arena.take<float>(rows)),
        d_rows_(arena.take<float>(span < f.p.S ? 2 * rows * Lanes<rows>::blocks(f.p) * f.p.signals : 0)) {}

  // One block of rows against the keys of `sums`, which are those in [span.begin, span.end).
  void block(int64_t b, int64_t g, int64_t index, Range span, const Sums& sums) {
    const Lanes<rows> lanes(p_, g, index);
    const Range keys = visible(p_, b, lanes.t_min, lanes.t_max, {0, p_.S});
    if (keys.begin == keys.end) {
      for (int64_t signal = 0; span.end == p_.S && signal < p_.signals; ++signal)
        write(b, lanes, signal, /*empty=*/true);
      return;
    }
    const int64_t begin = keys.begin / p_.tile, end = (keys.end + p_.tile - 1) / p_.tile;
    const bool first = keys.end > span.begin && keys.end <= span.end;
    const bool again = keys.end > span.end && keys.begin < span.end;
    if (!first && !again)
      return;
    // A block's first visit makes its d_q from all of its tiles and adds those of the span; the next ones add alone.
    const int64_t lowest = std::max(begin, span.begin / p_.tile), from = first ? begin : lowest;
    const int64_t to = first ? end : std::min(end, (span.end + p_.tile - 1) / p_.tile);
    for (int64_t signal = 0; signal < p_.signals; ++signal) {
      const bool last = signal == p_.signals - 1;
      pack(b, lanes, signal);
      if (again)
        recall(index * p_.signals + signal);
      else
        hold(b, g, lanes, signal, keys, begin, end);
      if (first && several_spans())
        keep(index * p_.signals + signal);
      pack_rows(rows_at(f_.q1, b, lanes, p_.signals, signal), rows, p_.D, q1_rows_);
      if (last)
        pack_rows(rows_at(f_.q2, b, lanes, 1, 0), rows, p_.D, q2_rows_);
      pack_rows(rows_at(f_.d_output, b, lanes, p_.signals, signal), rows, p_.Dv, do_rows_);
      // Backwards: the tiles held last are the ones still in the caches.
      for (int64_t tile = to - 1; tile >= from; --tile) {
        const int64_t start = tile * p_.tile, m = tile_rows(p_, tile, keys.end);
        // Only what is used again needs a place of its own.
        const int64_t at = first ? start : 0, at2 = p_.signals > 1 ? start : at;
        if (again)
          maps(b, g, lanes, signal, start, m, /*sum=*/false, at, at2);
        if (p_.signals == 1)
          gradients</*shared=*/false>(at, at, m, signal);
        else
          gradients</*shared=*/true>(at, at2, m, signal);
        const element *p = tile_, *s1 = p + p_.tile * rows, *s2 = s1 + p_.tile * rows;
        if (first) {
          query_gradient(f_.k1, b, g, start, m, s2 + p_.tile * rows, dq1_, tile != to - 1);
          if (last)
            query_gradient(f_.k2, b, g, start, m, s2 + 2 * p_.tile * rows, dq2_, tile != to - 1);
        }
        if (tile < lowest)
          continue;
        multiply(m, p_.Dv, rows, p, rows, do_rows_, p_.Dv, sums.at(sums.v, sums.v_row, start), sums.v_row, true);
        multiply(m, p_.D, rows, s1, rows, q1_rows_, p_.D, sums.at(sums.k1, sums.k_row, start), sums.k_row, true);
        if (last)
          multiply(m, p_.D, rows, s2, rows, q2_rows_, p_.D, sums.at(sums.k2, sums.k_row, start), sums.k_row, true);
      }
      if (first)
        write(b, lanes, signal, /*empty=*/false);
    }
  }

 private:
  void pack(int64_t b, const Lanes<rows>& lanes, int64_t signal) {
    pack_columns<element, rows>(rows_at(f_.q1, b, lanes, p_.signals, signal), p_.D, q1_columns_);
    if (signal == 0)
      pack_columns<element, rows>(rows_at(f_.q2, b, lanes, 1, 0), p_.D, q2_columns_);
    pack_columns<element, rows>(rows_at(f_.d_output, b, lanes, p_.signals, signal), p_.Dv, do_columns_);
    for (int64_t lane = 0; lane < rows; ++lane) {
      const int64_t h = lanes.head[lane] * p_.signals + signal, t = lanes.t[lane];
      std::tie(m1_[lane], inverse1_[lane]) = f_.kept(0, b, h, t);
      std::tie(m2_[lane], inverse2_[lane]) = f_.kept(1, b, h, t);
      lam_[lane] = *f_.lam.at(b, t, h);
    }
  }

  // A1, A2 and dP of a tile, at rows `at` and, of A2, `at2` of the held tiles, where A2 lies already but for the first
  // of the signal heads that share it; adds their products to D1 and D2 where `sum` says so.
  void maps(
      int64_t b, int64_t g, const Lanes<rows>& lanes, int64_t signal, int64_t start, int64_t m, bool sum, int64_t at,
      int64_t at2) {
    if (signal == 0)
      maps_of</*noise=*/true>(b, g, lanes, start, m, sum, at, at2);
    else
      maps_of</*noise=*/false>(b, g, lanes, start, m, sum, at, at2);
  }

  template <bool noise>
  void maps_of(
      int64_t b, int64_t g, const Lanes<rows>& lanes, int64_t start, int64_t m, bool sum, int64_t at, int64_t at2) {
    constexpr int columns = rows / kLanes, group = columns < 2 ? columns : kLanes == 16 && columns > 2 ? 4 : 2;
    float *s1 = scores_, *s2 = s1 + p_.tile * rows, *s3 = s2 + p_.tile * rows;
    const auto k1 = rows_of(f_.k1, b, g, start, m, p_.D, k_);
    score_tile(p_, k1, b, start, m, lanes, q1_columns_, s1);
    if constexpr (noise) {
      const auto k2 = p_.one_key ? k1 : rows_of(f_.k2, b, g, start, m, p_.D, k_);
      score_tile(p_, k2, b, start, m, lanes, q2_columns_, s2);
    }
    const auto v = rows_of(f_.v, b, g, start, m, p_.Dv, k_);
    multiply(m, rows, p_.Dv, v.data, v.row, do_columns_, rows, s3, rows, false);
    const Powers<scalar> power(p_);
    auto map = [&power](Floats score, const float* highest, const float* inverse) {
      return exp2<exp_degree<scalar>>(power(score - load(highest))) * load(inverse);
    };
    element *a1 = a1_ + at * rows, *a2 = a2_ + at2 * rows, *dp = dp_ + at * rows;
    for (int lane = 0; lane < rows; lane += group * kLanes) {
      Floats d1[group] = {}, d2[group] = {};
      for (int64_t first = 0; first < m; first += 16) {
        // Sums of sixteen, then of those: a long chain of additions would round more than all else here.
        Floats part1[group] = {}, part2[group] = {};
        for (int64_t i = first; i < std::min(first + 16, m); ++i)
#pragma GCC unroll 4
          for (int c = 0; c < group; ++c) {
            const int column = lane + c * kLanes;
            const int64_t j = i * rows + column;
            // What is held is what is summed, so that a row's dS sum to 0 after rounding too.
            const Floats x = store_as(a1 + j, map(load(s1 + j), m1_ + column, inverse1_ + column));
            Floats y;
            if constexpr (noise)
              y = store_as(a2 + j, map(load(s2 + j), m2_ + column, inverse2_ + column));
            else
              y = load(a2 + j);
            const Floats z = store_as(dp + j, load(s3 + j));
            part1[c] += x * z;
            part2[c] += y * z;
          }
        for (int c = 0; c < group; ++c) {
          d1[c] += part1[c];
          d2[c] += part2[c];
        }
      }
      for (int c = 0; sum && c < group; ++c) {
        const int column = lane + c * kLanes;
        store(d1_ + column, load(d1_ + column) + d1[c]);
        store(d2_ + column, load(d2_ + column) + d2[c]);
      }
    }
  }

  void hold(
      int64_t b, int64_t g, const Lanes<rows>& lanes, int64_t signal, Range keys, int64_t begin, int64_t end) {
    std::fill(d1_, d1_ + rows, 0.0f);
    std::fill(d2_, d2_ + rows, 0.0f);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tile * p_.tile;
      maps(b, g, lanes, signal, start, tile_rows(p_, tile, keys.end), /*sum=*/true, start, start);
    }
  }

  void keep(int64_t index) {
    std::copy(d1_, d1_ + rows, d_rows_ + 2 * index * rows);
    std::copy(d2_, d2_ + rows, d_rows_ + (2 * index + 1) * rows);
  }

  void recall(int64_t index) {
    std::copy_n(d_rows_ + 2 * index * rows, rows, d1_);
    std::copy_n(d_rows_ + (2 * index + 1) * rows, rows, d2_);
  }

  // P, dS1 and dS2 of a held tile (tile × rows), and behind them dS1 and dS2 as (rows × tile). Where signal heads share
  // their noise, dS2 is that of the last of them, with the sum over the others.
  template <bool shared>
  void gradients(int64_t at, int64_t at2, int64_t m, int64_t signal) {
    const int64_t size = p_.tile * rows;
    const bool head = signal == 0, last = signal == p_.signals - 1;
    const element *a1 = a1_ + at * rows, *a2 = a2_ + at2 * rows, *dp = dp_ + at * rows;
    float* weighted = weighted_ + at2 * rows;
    for (int lane = 0; lane < rows; lane += kLanes) {
      const Floats d1 = load(d1_ + lane), d2 = load(d2_ + lane), lam = load(lam_ + lane), minus = lam * -p_.scale;
      for (int64_t first = 0; first < m; first += kLanes) {
        Words s1[kLanes], s2[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          if (first + i >= m) {
            s1[i] = s2[i] = Words{};
            continue;
          }
          const int64_t j = (first + i) * rows + lane;
          const Floats x = load(a1 + j), y = load(a2 + j), z = load(dp + j);
          const Floats u = x * p_.scale * (z - d1);
          Floats w;
          if constexpr (shared) {
            const Floats sum = head ? lam * (z - d2) : load(weighted + j) + lam * (z - d2);
            store(weighted + j, sum);
            w = y * -p_.scale * sum;
          } else {
            w = y * minus * (z - d2);
          }
          store(tile_ + j, x - lam * y);
          store(tile_ + size + j, u);
          s1[i] = (Words)u;
          if (shared && !last)
            continue;
          store(tile_ + 2 * size + j, w);
          s2[i] = (Words)w;
        }
        auto put = [&](Words (&s)[kLanes], element* to) {
          transpose(s);
          for (int64_t i = 0; i < kLanes; ++i)
            store(to + (lane + i) * p_.tile + first, (Floats)s[i]);
        };
        put(s1, tile_ + 3 * size);
        if (!shared || last)
          put(s2, tile_ + 4 * size);
      }
    }
  }

  // dq (rows × D) += dS (rows × m) · k
  void query_gradient(
      const View<const scalar>& keys, int64_t b, int64_t g, int64_t start, int64_t m, const element* s, float* dq,
      bool add) {
    pack_rows([&](int64_t i) { return keys.at(b, start + i, g); }, m, p_.D, k_);
    multiply(rows, p_.D, whole_pairs<element>(m), s, p_.tile, k_, p_.D, dq, p_.D, add);
  }

  bool several_spans() const {
    return q1_rows_ != q1_columns_;
  }

  // The gradients of a signal head, and with the last one those of its noise head.
  void write(int64_t b, const Lanes<rows>& lanes, int64_t signal, bool empty) {
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t noise = lanes.head[lane], h = noise * p_.signals + signal, t = lanes.t[lane];
      auto put = [&](const float* from, scalar* to) {
        if (empty)
          std::fill_n(to, p_.D, scalar(0.0f));
        else
          copy_row(from + lane * p_.D, p_.D, to);
      };
      put(dq1_, f_.d_q1.at(b, t, h));
      if (signal == p_.signals - 1)
        put(dq2_, f_.d_q2.at(b, t, noise));
      *f_.d_lam.at(b, t, h) = empty ? 0.0f : -d2_[lane];
    }
  }

  const Backward<scalar>& f_;
  const Problem& p_;
  element *a1_, *a2_, *dp_;
  float *scores_, *weighted_;  // Σ λ (dP − D2) over the signal heads so far
  element *tile_, *k_;  // the gradients of a tile take the place of its scores
  element *q1_columns_, *q2_columns_, *do_columns_, *q1_rows_, *q2_rows_, *do_rows_;
  float *dq1_, *dq2_, *m1_, *m2_, *inverse1_, *inverse2_, *lam_, *d1_, *d2_, *d_rows_;
};

template <typename scalar, typename element, int rows>
void run(const Backward<scalar>& f) {
  const Problem& p = f.p;
  const int64_t blocks = Lanes<rows>::blocks(p), groups = p.B * p.G, threads = at::get_num_threads();
  // A group is cut into parts only where threads would be idle: each part has sums of its own.
  const bool even = groups % threads == 0 || groups >= 4 * threads;
  const int64_t parts = std::min(blocks, even ? 1 : groups > threads ? 2 : (threads + groups - 1) / groups);
  // In place only where one worker sums all of a group, in the dtype of the sums.
  const bool in_place = parts == 1 && sizeof(scalar) == sizeof(float);
  const int64_t width = (p.one_key ? 1 : 2) * p.D + p.Dv;
  // Keys whose sums take kSums bytes of a worker; all of them where they are summed in place or by several workers.
  const int64_t fitting = kSums / (width * int64_t(sizeof(float))) / p.tile * p.tile;
  const int64_t span = in_place || parts > 1 ? p.S : std::min(p.S, std::max(fitting, p.tile));
  at::Tensor partial;
  if (parts > 1)
    partial = at::empty({groups * parts, p.S * width}, at::kFloat);

  auto clear = [&](View<scalar> x, int64_t b, int64_t g, int64_t columns) {
    for (int64_t s = 0; s < p.S; ++s)
      std::fill_n(x.at(b, s, g), columns, scalar(0.0f));
  };
  auto layout = [&](Arena& arena) {
    Worker<scalar, element, rows>(f, arena, span);
    if (!in_place && parts == 1)
      arena.take<float>(std::min(span, p.S) * width);
  };
  share<element>(groups * parts, layout, [&](int64_t unit, Arena arena) {
    Worker<scalar, element, rows> worker(f, arena, span);
    const int64_t b = unit / parts / p.G, g = unit / parts % p.G;
    float* memory = nullptr;
    if (parts > 1)
      memory = partial.data_ptr<float>() + unit * p.S * width;
    else if (!in_place)
      memory = arena.take<float>(std::min(span, p.S) * width);
    for (int64_t begin = (p.S - 1) / span * span; begin >= 0; begin -= span) {
      const int64_t end = std::min(p.S, begin + span), count = end - begin;
      Sums sums{};
      if constexpr (sizeof(scalar) == sizeof(float)) {
        if (in_place) {
          sums = {f.d_k1.at(b, begin, g), p.one_key ? f.d_k1.at(b, begin, g) : f.d_k2.at(b, begin, g),
                  f.d_v.at(b, begin, g), f.d_k1.row, f.d_v.row, begin};
          clear(f.d_k1, b, g, p.D);
          if (!p.one_key)
            clear(f.d_k2, b, g, p.D);
          clear(f.d_v, b, g, p.Dv);
        }
      }
      if (!in_place) {
        sums = {memory, p.one_key ? memory : memory + count * p.D, memory + count * (width - p.Dv), p.D, p.Dv, begin};
        std::fill_n(memory, count * width, 0.0f);
      }
      for (int64_t block = blocks - 1 - unit % parts; block >= 0; block -= parts)
        worker.block(b, g, block, {begin, end}, sums);
      for (int64_t s = 0; parts == 1 && !in_place && s < count; ++s) {
        copy_row(sums.k1 + s * p.D, p.D, f.d_k1.at(b, begin + s, g));
        if (!p.one_key)
          copy_row(sums.k2 + s * p.D, p.D, f.d_k2.at(b, begin + s, g));
        copy_row(sums.v + s * p.Dv, p.Dv, f.d_v.at(b, begin + s, g));
      }
    }
  });
  if (parts == 1)
    return;
  // The parts of a group, always in the same order.
  const float* all = partial.const_data_ptr<float>();
  parallel_for(groups * p.S, 64, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t b = i / p.S / p.G, g = i / p.S % p.G, s = i % p.S;
      auto add = [&](int64_t offset, int64_t columns, scalar* out) {
        for (int64_t j = 0; j < columns; ++j) {
          float total = 0.0f;
          for (int64_t part = 0; part < parts; ++part)
            total += all[((b * p.G + g) * parts + part) * p.S * width + offset + s * columns + j];
          out[j] = scalar(total);
        }
      };
      add(0, p.D, f.d_k1.at(b, s, g));
      if (!p.one_key)
        add(p.S * p.D, p.D, f.d_k2.at(b, s, g));
      add(p.S * (width - p.Dv), p.Dv, f.d_v.at(b, s, g));
    }
  });
}

}  // namespace

// Every block streams its group's keys, values and sums from the third cache, which is what bounds long rows: the wider
// the blocks, the less of it. In bfloat16, where all is half as large, 64 rows would hold more than they save.
template <typename scalar, typename element>
void run_backward(const Backward<scalar>& f) {
  if constexpr (std::is_same_v<scalar, float>)
    if (f.p.T >= 64)
      return run<scalar, element, 64>(f);
  if (f.p.noise * f.p.T > 16)
    run<scalar, element, 32>(f);
  else
    run<scalar, element, 16>(f);
}

template void run_backward<float, float>(const Backward<float>&);
template void run_backward<at::Half, float>(const Backward<at::Half>&);
template void run_backward<at::BFloat16, float>(const Backward<at::BFloat16>&);
#if DIFFATTN_BFLOAT16_PRODUCTS
template void run_backward<at::BFloat16, at::BFloat16>(const Backward<at::BFloat16>&);
#endif

}  // namespace diffattn

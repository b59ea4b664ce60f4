#pragma once

#include "problem.h"

namespace diffattn {

// The gradients, contiguous (B, T, H, ·) and (B, S, G, ·); d_k2 is null where both maps share their keys.
template <typename scalar>
struct Backward {
  Problem p;
  View<const scalar> d_output, q1, k1, q2, k2, v;
  View<const float> lam;
  const float* rows;
  View<scalar> d_q1, d_k1, d_q2, d_k2, d_v;
  View<float> d_lam;

  // The largest score of a row and 1 / the sum of its exponentials.
  std::pair<float, float> kept(int64_t map, int64_t b, int64_t h, int64_t t) const {
    const float* at = rows + ((map * p.B + b) * p.H + h) * p.T + t;
    return {*at, at[2 * p.B * p.H * p.T]};
  }
};

// Float32 sums of the gradients of one group's keys and values, for keys from `start` on.
struct Sums {
  float *k1, *k2, *v;
  int64_t k_row, v_row, start;

  float* at(float* base, int64_t row, int64_t s) const {
    return base + (s - start) * row;
  }
};

// Every gradient is written; none needs to be cleared before.
// `element`: what the products are of.
template <typename scalar, typename element>
void run_backward(const Backward<scalar>& f);

}  // namespace diffattn

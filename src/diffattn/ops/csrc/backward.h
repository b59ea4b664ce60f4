#pragma once

#include "problem.h"

namespace diffattn {

// The gradients, contiguous (B, T, H, ·) and (B, S, G, ·); d_k2 is null where both maps share their keys.
template <typename scalar>
struct Backward {
  Problem p;
  View<const scalar> d_output, q1, k1, q2, k2, v;
  View<const float> lam;
  const float* lse;
  View<scalar> d_q1, d_k1, d_q2, d_k2, d_v;
  View<float> d_lam;

  // The log-sum-exp of a row and what rounding took from it.
  std::pair<float, float> kept(int64_t map, int64_t b, int64_t h, int64_t t) const {
    const float* at = lse + ((map * p.B + b) * p.H + h) * p.T + t;
    return {*at, sizeof(scalar) == sizeof(float) ? at[2 * p.B * p.H * p.T] : 0.0f};
  }
};

// Every gradient is written; none needs to be cleared before.
template <typename scalar>
void run_backward(const Backward<scalar>& f);

}  // namespace diffattn

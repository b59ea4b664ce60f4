#pragma once

#include "problem.h"

namespace diffattn {

// output (B, T, H, Dv) in the inputs' dtype; rows (4, B, H, T), of each output head: of both maps the largest score, then of both 1 / the sum
// of their exponentials, which are 0 and 0 for a row that sees no key. A log-sum-exp would be one number, and rounding
// it the largest error of a map. Without gradients it is null.
template <typename scalar>
struct Forward {
  Problem p;
  View<const scalar> q1, k1, q2, k2, v;
  View<const float> lam;  // head is the last dimension: (B, T, H) with row and head strides
  View<scalar> output;
  float* rows;

  void keep(int64_t map, int64_t b, int64_t h, int64_t t, float highest, float inverse) const {
    if (!rows)
      return;
    float* at = rows + ((map * p.B + b) * p.H + h) * p.T + t;
    at[0] = highest;
    at[2 * p.B * p.H * p.T] = inverse;
  }
};

// `element`: what the products are of.
template <typename scalar, typename element>
void run_forward(const Forward<scalar>& f);

// What an output row is multiplied by behind the subtraction: scale · gain / rms. A null gain is ones.
struct Norm {
  const float* gain;
  float scale, eps;
};

// For a few queries over many keys: reads every key and value once, split over the keys. A null norm is none.
template <typename scalar>
void run_decoding(const Forward<scalar>& f, const Norm* norm = nullptr);

}  // namespace diffattn

#pragma once

#include "problem.h"

namespace diffattn {

// output (B, T, H, Dv) in the inputs' dtype; lse (2, B, H, T) in powers of 2, +inf for a row that sees no key. In
// float32 it is (4, B, H, T): what rounding takes from each is kept too, else it would be the largest error of a map.
// Without gradients it is null.
template <typename scalar>
struct Forward {
  Problem p;
  View<const scalar> q1, k1, q2, k2, v;
  View<const float> lam;  // head is the last dimension: (B, T, H) with row and head strides
  View<scalar> output;
  float* lse;

  void keep(int64_t map, int64_t b, int64_t h, int64_t t, double value) const {
    if (!lse)
      return;
    float* at = lse + ((map * p.B + b) * p.H + h) * p.T + t;
    *at = value;
    if (sizeof(scalar) == sizeof(float))
      at[2 * p.B * p.H * p.T] = value == kInfinity ? 0.0f : value - *at;
  }
};

template <typename scalar>
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

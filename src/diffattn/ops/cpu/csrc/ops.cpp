// The operators: checked tensors in, kernels chosen, tensors out.
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "backward.h"
#include "forward.h"

namespace diffattn {
namespace {

using at::Tensor;

// The inputs in a layout that the products read: unit stride along the width, rows apart by at least the width.
Tensor readable(const Tensor& x) {
  const bool width = x.size(3) == 1 || x.stride(3) == 1, rows = x.size(1) == 1 || x.stride(1) >= x.size(3);
  return width && rows ? x : x.contiguous();
}

struct Inputs {
  Tensor q1, k1, q2, k2, v, lam, queries;
  Problem p;

  Inputs(
      const Tensor& q1_, const Tensor& k1_, const Tensor& q2_, const std::optional<Tensor>& k2_, const Tensor& v_,
      const Tensor& lam_, const std::optional<Tensor>& queries_, bool causal, double scale)
      : q1(readable(q1_)),
        k1(readable(k1_)),
        q2(readable(q2_)),
        k2(k2_ ? readable(*k2_) : k1),
        v(readable(v_)),
        lam(lam_) {
    const int64_t B = q1.size(0), T = q1.size(1), S = k1.size(1), H = q1.size(2), G = k1.size(2);
    const int64_t noise = q2.size(2);
    TORCH_CHECK(
        q2.size(0) == B && q2.size(1) == T && q2.size(3) == q1.size(3) && H % noise == 0 && noise % G == 0 &&
            k1.sizes() == k2.sizes() && k1.size(3) == q1.size(3) && v.size(0) == B && v.size(1) == S && v.size(2) == G && k1.size(0) == B,
        "fused_cpu: shapes do not fit");
    TORCH_CHECK(
        lam.scalar_type() == at::kFloat && lam.dim() == 3 && lam.size(0) == B && lam.size(1) == T && lam.size(2) == H,
        "fused_cpu: lam must be float32 (batch, queries, heads)");
    for (const Tensor& x : {k1, q2, k2, v})
      TORCH_CHECK(x.scalar_type() == q1.scalar_type(), "fused_cpu: dtypes differ");
    TORCH_CHECK(
        v.scalar_type() != at::kBFloat16 || (q1.size(3) % 2 == 0 && v.size(3) % 2 == 0),
        "fused_cpu: widths must be even in bfloat16");
    if (queries_) {
      TORCH_CHECK(
          queries_->scalar_type() == at::kInt && queries_->sizes() == at::IntArrayRef({2, B, S}),
          "fused_cpu: queries must be int32 (2, batch, keys)");
      queries = queries_->contiguous();
    }
    TORCH_CHECK(queries_ || !causal || T <= S, "fused_cpu: more queries than keys with causal=True");
    p = {B, T, S, H, G, q1.size(3), v.size(3), noise / G, H / noise, S > 512 ? 128 : 64, !k2_, causal, float(scale), scale * kLog2E, queries_ ? queries.const_data_ptr<int32_t>() : nullptr};
  }
};

template <typename scalar>
View<const scalar> reading(const Tensor& x) {
  return {x.const_data_ptr<scalar>(), x.stride(0), x.stride(1), x.stride(2)};
}

// Whether the processor multiplies bfloat16 and oneDNN may use it. Where it does not, oneDNN would imitate such products.
bool has_bfloat16_products() {
  if constexpr (!kBfloat16Products)
    return false;
  static const bool has = [] {
    const auto all = at::cpu::get_cpu_capabilities();
    const bool any = std::any_of(all.begin(), all.end(), [](const auto& entry) {
      return (entry.first == "avx512_bf16" || entry.first == "amx_bf16") && entry.second.toBool();
    });
    constexpr int64_t n = 16;
    const std::vector<at::BFloat16> ones(any ? n * n : 0, at::BFloat16(1.0f));
    float c[n * n] = {};
    try {
      if (any)
        multiply(n, n, n, ones.data(), n, ones.data(), n, c, n, false);
      end_products<at::BFloat16>();
    } catch (const std::exception&) {
      return false;
    }
    return c[0] == n;
  }();
  return has;
}

// Calls `run(scalar, element)`: what the tensors hold and what the products are of.
template <typename Run>
void by_dtype(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat:
      return run(float(), float());
    case at::kHalf:
      return run(at::Half(), float());
    case at::kBFloat16:
      if constexpr (kBfloat16Products)
        if (has_bfloat16_products())
          return run(at::BFloat16(), at::BFloat16());
      return run(at::BFloat16(), float());
    default:
      TORCH_CHECK(false, "fused_cpu: wanted float32, float16 or bfloat16");
  }
}

// Whether a forward call is one of few queries, split over the keys.
bool decodes(const Problem& p) {
  return p.T <= 8;
}

template <typename scalar>
Forward<scalar> forward(const Inputs& x, const Tensor& output, const Tensor& rows) {
  return {x.p, reading<scalar>(x.q1), reading<scalar>(x.k1), reading<scalar>(x.q2), reading<scalar>(x.k2),
          reading<scalar>(x.v), reading<float>(x.lam), view<scalar>(output),
          rows.defined() ? rows.data_ptr<float>() : nullptr};
}

std::tuple<Tensor, Tensor> fused_cpu(
    const Tensor& q1, const Tensor& k1, const Tensor& q2, const std::optional<Tensor>& k2, const Tensor& v,
    const Tensor& lam, const std::optional<Tensor>& queries, bool causal, double scale) {
  const Inputs x(q1, k1, q2, k2, v, lam, queries, causal, scale);
  const Problem& p = x.p;
  Tensor output = at::empty({p.B, p.T, p.H, p.Dv}, v.options());
  Tensor rows = at::empty({4, p.B, p.H, p.T}, lam.options());
  if (output.numel() == 0)
    return {output, rows};
  by_dtype(v.scalar_type(), [&]<typename scalar, typename element>(scalar, element) {
    const auto f = forward<scalar>(x, output, rows);
    if (decodes(p))
      run_decoding(f);
    else
      run_forward<scalar, element>(f);
  });
  return {output, rows};
}

// As a layer calls it, heads before tokens, signal heads and behind them their noise head, with its norm and without gradients: one operator where
// the views, the expansion of λ and the norm would take longer than a short cache.
Tensor fused_cpu_decoding(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lam,
    const std::optional<Tensor>& queries, double scale, const std::optional<Tensor>& gain, double norm_scale,
    std::optional<double> eps, bool causal, int64_t signals) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "fused_cpu_decoding: wanted four dimensions");
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor q = query.transpose(1, 2), k = key.transpose(1, 2);
  const int64_t B = q.size(0), T = q.size(1), N = q.size(2), D = q.size(3), step = signals + 1, H = N / step * signals;
  TORCH_CHECK(
      signals > 0 && N % step == 0 && (k.size(3) == D || k.size(3) == 2 * D),
      "fused_cpu_decoding: shapes do not fit");
  const auto second = k.size(3) == D ? std::nullopt : std::optional<Tensor>(k.slice(3, D));
  // Every second head is a view; a few heads out of more are copied, which takes longer than a short cache.
  const Tensor q1 = signals == 1 ? q.slice(2, 0, N, 2)
                                 : q.unflatten(2, {N / step, step}).slice(3, 0, signals).reshape({B, T, H, D});
  const Inputs x(
      q1, k.slice(3, 0, D), q.slice(2, signals, N, step), second, value.transpose(1, 2), lam.expand({B, T, H}), queries,
      causal, scale);
  const Problem& p = x.p;
  TORCH_CHECK(decodes(p), "fused_cpu_decoding: too many queries");
  Tensor gains;
  if (gain) {
    TORCH_CHECK(gain->dim() == 1 && gain->size(0) == p.Dv, "fused_cpu_decoding: gain does not fit");
    gains = gain->to(at::kFloat).contiguous();
  }
  const Norm norm{gain ? gains.const_data_ptr<float>() : nullptr, float(norm_scale), float(eps.value_or(0.0))};
  Tensor output = at::empty({p.B, p.T, p.H, p.Dv}, value.options());
  if (output.numel() == 0)
    return output;
  by_dtype(value.scalar_type(), [&]<typename scalar, typename element>(scalar, element) {
    run_decoding(forward<scalar>(x, output, {}), eps ? &norm : nullptr);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_cpu_backward(
    const Tensor& d_output_, const Tensor& q1, const Tensor& k1, const Tensor& q2, const std::optional<Tensor>& k2,
    const Tensor& v, const Tensor& lam, const std::optional<Tensor>& queries, const Tensor& rows_, bool causal,
    double scale) {
  const Inputs x(q1, k1, q2, k2, v, lam, queries, causal, scale);
  const Problem& p = x.p;
  const Tensor d_output = readable(d_output_);
  Tensor rows = rows_.contiguous();
  TORCH_CHECK(
      d_output.scalar_type() == v.scalar_type() && d_output.sizes() == at::IntArrayRef({p.B, p.T, p.H, p.Dv}),
      "fused_cpu_backward: d_output does not fit");
  TORCH_CHECK(
      rows.scalar_type() == at::kFloat && rows.numel() == 4 * p.B * p.H * p.T,
      "fused_cpu_backward: rows does not fit");
  Tensor d_q1 = at::empty(q1.sizes(), v.options()), d_q2 = at::empty(q2.sizes(), v.options());
  // A group's gradients lie together, as they are summed: rows a whole token apart would each be on a page of its own.
  auto of_group = [&](int64_t width) { return at::empty({p.B, p.G, p.S, width}, v.options()).transpose(1, 2); };
  Tensor d_k1 = of_group(p.D), d_v = of_group(p.Dv);
  Tensor d_k2 = p.one_key ? at::empty({0}, v.options()) : of_group(p.D);
  Tensor d_lam = at::empty({p.B, p.T, p.H}, lam.options());
  if (d_output.numel() == 0 || v.numel() == 0) {
    for (Tensor* x : {&d_q1, &d_q2, &d_k1, &d_k2, &d_v, &d_lam})
      x->zero_();
    return {d_q1, d_k1, d_q2, d_k2, d_v, d_lam};
  }
  by_dtype(v.scalar_type(), [&]<typename scalar, typename element>(scalar, element) {
    if (decodes(p)) {
      // Decoding sums scores in another order than the products here, and a map that is normalised by the sum of others
      // does not quite sum to 1: its gradients would not cancel where they have to.
      rows = at::empty_like(rows);
      run_forward<scalar, element>(forward<scalar>(x, at::empty({p.B, p.T, p.H, p.Dv}, v.options()), rows));
    }
    run_backward<scalar, element>(Backward<scalar>{
        p, reading<scalar>(d_output), reading<scalar>(x.q1), reading<scalar>(x.k1), reading<scalar>(x.q2),
        reading<scalar>(x.k2), reading<scalar>(x.v), reading<float>(x.lam), rows.const_data_ptr<float>(),
        view<scalar>(d_q1), view<scalar>(d_k1), view<scalar>(d_q2),
        p.one_key ? View<scalar>{} : view<scalar>(d_k2), view<scalar>(d_v), view<float>(d_lam)});
  });
  return {d_q1, d_k1, d_q2, d_k2, d_v, d_lam};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(diffattn, library) {
  library.def("fused_cpu_bfloat16_products() -> bool", has_bfloat16_products);
}

TORCH_LIBRARY_IMPL(diffattn, CPU, library) {
  library.impl("fused_cpu", fused_cpu);
  library.impl("fused_cpu_decoding", fused_cpu_decoding);
  library.impl("fused_cpu_backward", fused_cpu_backward);
}

}  // namespace diffattn

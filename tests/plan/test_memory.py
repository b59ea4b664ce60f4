import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.errors import ConfigError
from diffattn.plan.activations import BACKENDS, layer
from diffattn.plan.cost import cache_bytes_per_token, count_parameters, weight_bytes
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory, training_moments
from diffattn.plan.setting import BYTES, PRECISIONS, Precision, Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

# Every dimension is another prime where the rules allow it.
PRIME = ModelShape(
    hidden_size=61,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=14,
    intermediate_size=163,
    vocab_size=131,
    tie_word_embeddings=False,
)
FORMS = [
    (attention, backend)
    for attention, backend in itertools.product(VARIANTS, BACKENDS)
    if backend in VARIANTS[attention].flops
]
few = settings(derandomize=True, max_examples=60, deadline=None, database=None)


def refused(call, *wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert "; wanted " in line
    for words in wanted:
        assert words in line, line


def test_a_layer_by_hand():
    """Softmax in float32, in numbers per token: of both norms input, x̂, result and 1/rms; q, k, v, result and its
    log-sum-exps; gate, up, silu and product. V1 fused: two log-sum-exps in two parts per output head, then its norm.
    """
    D, F, width, keys, n = 61, 163, 84, 28, 6
    softmax = 2 * (3 * D + 1) + width + 2 * keys + width + n + 4 * F
    assert layer(PRIME, "softmax", backend="standard", size=4, autocast=False).token == 4 * softmax
    v1 = softmax - n + 4 * n // 2 + 2 * width + n // 2
    assert layer(PRIME, "diff_v1", backend="fused_cpu", size=4, autocast=False).token == 4 * v1
    # V1 in the Triton kernel: one log-sum-exp of each map and output head, and O2 in the dtype of the output.
    triton = v1 - 4 * n // 2 + 2 * n // 2 + 2 * width
    assert layer(PRIME, "diff_v1", backend="fused_triton", size=4, autocast=False).token == 4 * triton
    # The one padded call: q and the result twice as wide, the difference beside it.
    padded = softmax + width + (2 * width - width) + 3 * width + n // 2
    assert layer(PRIME, "diff_v1", backend="standard", size=4, autocast=False).token == 4 * padded
    # V2: twice the queries, λ, and two log-sum-exps in two parts for each of n heads.
    v2 = softmax + width + n - n + 4 * n
    assert layer(PRIME, "diff_v2", backend="fused_cpu", size=4, autocast=False).token == 4 * v2
    # The gate, and its product with what softmax keeps.
    assert layer(PRIME, "gated", backend="standard", size=4, autocast=False).token == 4 * (softmax + 2 * width)


def test_only_materialised_maps_cost_memory_by_the_square():
    for attention, backend in FORMS:
        found = layer(PRIME, attention, backend=backend, size=2, autocast=False)
        # Six heads, of which three share a key/value head: three signal heads and one noise head, and six and two.
        maps = {"diff_v2": 12, "diff_gda": 4, "diff_gda_v2": 8}.get(attention, 6)
        assert found.scores == (6 * maps if backend == "materialised" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("attention", "backend"), FORMS)
def test_every_moment_is_an_exact_polynomial(attention, backend, precision):
    for checkpointing in (False, True):

        def at(batch, context, checkpointing=checkpointing):
            setting = Setting(
                batch=batch, context=context, precision=precision, backend=backend, checkpointing=checkpointing
            )
            found = training_moments(PRIME, attention, setting)
            return {name: memory.total for name, memory in found.items()}

        table = {(B, T): at(B, T) for B in range(1, 5) for T in range(1, 6)}
        for name in table[1, 1]:
            f = {point: values[name] for point, values in table.items()}
            assert all(isinstance(value, int) for value in f.values())
            for B, T in itertools.product(range(1, 5), range(1, 3)):
                assert f[B, T + 3] - 3 * f[B, T + 2] + 3 * f[B, T + 1] - f[B, T] == 0, "of degree 2 in T"
                square = f[B, T + 2] - 2 * f[B, T + 1] + f[B, T]
                assert square == B * (f[1, 3] - 2 * f[1, 2] + f[1, 1]), "T² only with B"
            for B, T in itertools.product(range(1, 3), range(1, 6)):
                assert f[B + 2, T] - 2 * f[B + 1, T] + f[B, T] == 0, "of degree 1 in B"


@st.composite
def cases(draw):
    groups = 2 * draw(st.integers(1, 3))
    shape = ModelShape(
        hidden_size=draw(st.integers(8, 300)),
        num_layers=draw(st.integers(1, 7)),
        num_heads=groups * draw(st.integers(1, 3)),
        num_kv_heads=groups,
        head_dim=2 * draw(st.integers(1, 40)),
        intermediate_size=draw(st.integers(1, 2000)),
        vocab_size=draw(st.integers(1, 3000)),
        tie_word_embeddings=draw(st.booleans()),
    )
    attention, backend = draw(st.sampled_from(FORMS))
    if VARIANTS[attention].shares_noise and shape.num_heads == groups:
        shape = dataclasses.replace(shape, signals_per_noise=1)
    setting = Setting(
        backend=backend,
        batch=draw(st.integers(1, 9)),
        context=draw(st.integers(1, 3000)),
        precision=draw(st.sampled_from(list(PRECISIONS))),
        checkpointing=draw(st.booleans()),
    )
    return shape, attention, setting


@few
@given(cases())
def test_more_of_anything_needs_no_less(case):
    shape, attention, setting = case
    here = training_memory(shape, attention, setting)
    assert here.total == max(memory.total for memory in training_moments(shape, attention, setting).values())
    assert min(dataclasses.astuple(here)) >= 0
    for key in ("batch", "context"):
        more = dataclasses.replace(setting, **{key: getattr(setting, key) + 1})
        assert training_memory(shape, attention, more).total >= here.total
        for memory in (prefill_memory, decoding_memory):
            assert memory(shape, attention, more).total > memory(shape, attention, setting).total
    for key in ("num_layers", "vocab_size"):
        larger = dataclasses.replace(shape, **{key: getattr(shape, key) + 1})
        assert training_memory(larger, attention, setting).total > here.total


def test_a_gpu_needs_more_in_the_backward_pass_of_a_half_precision_call():
    def need(attention, backend, size, gpu):
        one = layer(PRIME, attention, backend=backend, size=size, autocast=False, gpu=gpu)
        return one.in_attention

    for attention, backend in FORMS:
        assert need(attention, backend, 4, True) == need(attention, backend, 4, False)
    # d_q of 6 heads in float32 and a sum a row; d_k and d_v for 6 heads instead of 2.
    assert need("softmax", "standard", 2, True) - need("softmax", "standard", 2, False) == 24 * 15 + 2 * 2 * 6 * 14
    # V1's padded call has widths of 28 and 1 group; unequal widths have d_q of 14, keys in 2 groups, values of 28 in 1.
    padded = need("diff_v1", "standard", 2, True) - need("diff_v1", "standard", 2, False)
    unequal = need("diff_v1", "unequal", 2, True) - need("diff_v1", "unequal", 2, False)
    assert (padded, unequal) == (24 * 29 + 2 * 2 * 6 * 28, 24 * 15 + 2 * 6 * (14 + 28))
    # Five numbers and the gradient of λ for each row of 3 output heads, wherever it is planned.
    for gpu in (False, True):
        assert need("diff_v1", "fused_triton", 2, gpu) - need("diff_v1", "fused_cpu", 2, gpu) == 6 * 4 * 3


def test_what_saves_memory_saves_it():
    shape = ModelShape.preset("1.4B")

    def total(attention="diff_v1", precision="fp32", backend="fused_cpu", checkpointing=False):
        setting = Setting(batch=2, context=2048, precision=precision, backend=backend, checkpointing=checkpointing)
        return training_memory(shape, attention, setting).total

    assert total(precision="bf16") < total(precision="mixed") < total(precision="autocast") < total()
    for precision in PRECISIONS:
        assert total(precision=precision, checkpointing=True) < total(precision=precision)
    assert total("softmax") < total() < total(backend="two_calls") < total(backend="standard")
    half = [total(precision="bf16", backend=name) for name in ("fused_cpu", "fused_triton", "unequal", "standard")]
    assert half == sorted(set(half))
    assert total(backend="standard") < total(backend="materialised")


def test_fixed_parts_are_the_parameters():
    for attention in VARIANTS:
        count = count_parameters(PRIME, attention).total
        lambdas = 3 * 4 * 14 if attention in ("diff_v1", "diff_gda") else 0
        own = {"softmax": 0, "diff_v1": 5, "diff_v2": 1, "diff_gda": 5, "diff_gda_v2": 1, "gated": 1}
        tensors = 3 * (9 + own[attention]) + 3
        fp32, mixed = (
            training_memory(PRIME, attention, Setting(context=5, precision=name)) for name in ("fp32", "mixed")
        )
        assert (fp32.weights, fp32.optimizer) == (4 * count, 8 * count + 4 * tensors)
        assert (mixed.weights, mixed.optimizer) == (2 * count + 2 * lambdas, 12 * count + 4 * tensors)
        assert weight_bytes(PRIME, attention, dtype="int4") == -(-(count - lambdas) // 2) + 4 * lambdas


def test_the_cache_is_that_of_the_cost():
    for attention, precision in itertools.product(VARIANTS, PRECISIONS):
        value = 4 if precision == "fp32" else 2
        wanted = 7 * 11 * cache_bytes_per_token(PRIME, attention, bytes_per_value=value)
        found = decoding_memory(PRIME, attention, Setting(batch=7, context=11, precision=precision))
        assert found.cache == wanted
    packed = Precision("int4", "bf16", "bf16", "bf16", "int8")
    found = decoding_memory(PRIME, "softmax", Setting(batch=7, context=11, precision=packed))
    assert found.cache == 7 * 11 * cache_bytes_per_token(PRIME, "softmax", bytes_per_value=1)
    assert found.weights == -(-count_parameters(PRIME, "softmax").total // 2)


def test_softmax_and_definition_have_no_form_of_their_own():
    def peak(attention, backend):
        return training_memory(PRIME, attention, Setting(batch=3, context=17, precision="bf16", backend=backend))

    assert len({peak("softmax", name) for name in BACKENDS[:-1]}) == 1
    for attention in ("diff_v1", "diff_v2"):
        assert peak(attention, "fused_cpu") == peak(attention, "definition")


def test_users_mistakes_are_one_line():
    good = Setting(context=8, precision="fp32")
    for memory in (training_memory, prefill_memory, decoding_memory, training_moments):
        refused(lambda memory=memory: memory(PRIME, "diff", good), "attention='diff'")
        two_calls = Setting(context=8, backend="two_calls")
        refused(lambda memory=memory, two_calls=two_calls: memory(PRIME, "diff_v2", two_calls), "of diff_v2")
    refused(lambda: Precision("fp32", "int8", "fp32", "fp32", "fp32"), "gradients='int8'", "bf16")
    refused(lambda: Precision("fp32", "fp32", "fp32", "fp32", "fp8"), "cache='fp8'", *BYTES)
    whole = Setting(precision=Precision("int8", "bf16", "fp32", "bf16", "bf16"))
    refused(lambda: training_memory(PRIME, "softmax", whole), "weights='int8'")
    refused(lambda: weight_bytes(PRIME, "softmax", dtype="fp8"), "dtype='fp8'")

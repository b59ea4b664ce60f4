import dataclasses
import math

import pytest
import torch

from diffattn.errors import ConfigError
from diffattn.train.recipe import Recipe, fast_bfloat16


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *((name, value) for name in ("steps", "batch_size", "gradient_accumulation", "evaluation_blocks",
                                     "checkpoints", "keep_checkpoints")
          for value in (0, -3, 2.5, math.nan, "4", None)),
        *(("evaluations", value) for value in (-1, 1.5, None)),
        *(("seed", value) for value in (-1, 2**31, 0.5)),
        *(("learning_rate", value) for value in (0.0, -1e-3, math.inf, math.nan)),
        *(("warmup_fraction", value) for value in (-0.1, 1.0, math.nan)),
        *((name, value) for name in ("weight_decay", "max_grad_norm") for value in (-1.0, math.inf, math.nan)),
        *((name, value) for name in ("beta1", "beta2") for value in (-0.1, 1.0, math.nan)),
        *(("dtype", value) for value in ("float16", "", None)),
        *(("device", value) for value in ("gpu", "cuda:1", None)),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_line_with_what_was_given_what_was_wanted_and_the_option(field: str, wrong) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe(**{field: wrong})
    line = str(raised.value)
    assert line.startswith(f"{field} is {wrong!r}; wanted ")
    assert line.endswith(f": change --{field.replace('_', '-')}")
    assert "\n" not in line


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 1},
        {"evaluations": 0},
        {"seed": 2**31 - 1},
        {"warmup_fraction": 0.0},
        {"warmup_fraction": 0.999},
        {"weight_decay": 0.0, "max_grad_norm": 0.0},
        {"beta1": 0.0, "beta2": 0.0},
    ],
)
def test_the_edges_of_the_ranges_are_accepted(fields: dict) -> None:
    assert Recipe(**fields).to_dict().items() >= fields.items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"device is 'cuda'; wanted a GPU .*: pass --device cpu"):
        Recipe(device="cuda")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_only_where_it_is_fast(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.train.recipe.fast_bfloat16", lambda device: fast)
    resolved = Recipe(device="cpu").resolved()
    assert resolved.dtype == ("bfloat16" if fast else "float32")
    assert resolved.device == "cpu"
    assert Recipe(device="cpu", dtype="float32").resolved().dtype == "float32"
    assert dataclasses.replace(resolved, dtype="auto") == Recipe(device="cpu")


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (True, False), (False, True)])
def test_bfloat16_on_a_cpu_wants_an_instruction_that_multiplies_it(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": avx512})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert fast_bfloat16("cpu") is (amx or avx512)


def test_tokens_per_step_counts_every_forward_pass() -> None:
    assert Recipe(batch_size=3, gradient_accumulation=5).tokens_per_step(context=7) == 105

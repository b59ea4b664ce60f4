"""The setting of a plan: its defaults, names as people write them, and what is refused."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.hardware import MACHINES
from diffattn.plan.setting import DEFAULT_SETTING, PRECISIONS, Precision, Setting, resolve_dtype
from diffattn.plan.shape import ModelShape


def test_names_and_objects_make_the_same_setting() -> None:
    named = Setting(context="4k", batch="1", precision="Mixed", backend="STANDARD", machine="h100")
    objects = Setting(context=4096, batch=1, precision=PRECISIONS["mixed"], machine=MACHINES["H100 SXM"])
    assert named == objects == Setting() == DEFAULT_SETTING
    assert replace(named, context=8).context == 8
    assert Setting(machine=None).machine is None
    with pytest.raises(FrozenInstanceError):
        named.context = 3


@pytest.mark.parametrize(("short", "long"), [("fp32", "float32"), ("bf16", "bfloat16"), ("bf16", "BFloat16")])
def test_a_format_has_the_name_that_the_other_commands_take(short: str, long: str) -> None:
    assert Setting(precision=long) == Setting(precision=short)
    assert resolve_dtype(long, "weights") == resolve_dtype(short, "weights") == short
    assert resolve_dtype("float16", "weights") == "fp16"


def test_a_machine_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"bandwidth": 2e9}')
    assert Setting(machine=str(file)).machine == Setting(machine=file).machine
    assert Setting(machine=file).machine.bandwidth == 2e9


def test_json_names_what_a_person_would_have_to_know() -> None:
    found = Setting(machine="m2", precision="autocast").to_json()
    assert list(found) == ["context", "batch", "precision", "backend", "checkpointing", "machine", "fsdp", "tp"]
    assert found["precision"] == {
        "weights": "fp32", "gradients": "fp32", "optimizer": "fp32", "activations": "bf16", "cache": "bf16",
        "master": None,
    }  # fmt: skip
    assert found["machine"]["name"] == "Apple M2"
    assert Setting(machine=None).to_json()["machine"] is None


def test_a_precision_has_the_name_that_it_is_known_by() -> None:
    assert [precision.name for precision in PRECISIONS.values()] == list(PRECISIONS)
    assert Precision("int4", "bf16", "bf16", "bf16", "bf16").name is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 0}, "context=0"),
        ({"context": True}, "context=True"),
        ({"context": "0"}, "context '0'"),
        ({"batch": -1}, "batch=-1"),
        ({"batch": "x"}, "batch 'x'"),
        ({"fsdp": 0}, "fsdp=0"),
        ({"tp": 0}, "tp=0"),
        ({"precision": "fp8"}, "precision='fp8'.*autocast"),
        ({"backend": "flash"}, "backend='flash'.*materialised"),
        ({"machine": "abacus"}, "machine 'abacus'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Setting(**changes)
    assert "\n" not in str(caught.value)


def test_a_backend_that_the_variant_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="two_calls"):
        Setting(backend="two_calls").check(ModelShape.preset("3M"), "diff_v2")

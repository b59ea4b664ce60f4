"""The setting of a plan: its defaults, names as people write them, and what is refused."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.hardware import MACHINES, Machine
from diffattn.plan.setting import DEFAULT_SETTING, PRECISIONS, Precision, Setting, resolve_dtype
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

SHAPE = ModelShape.preset("3M")


def test_names_and_objects_make_the_same_setting() -> None:
    named = Setting(context="4k", batch="1", precision="Mixed", backend="AUTO", machine="h100")
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
    assert list(found) == [
        "context",
        "batch",
        "precision",
        "backend",
        "checkpointing",
        "machine",
        "ranks",
        "shard",
        "tp",
        "per_host",
    ]
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
        ({"ranks": 0}, "ranks=0"),
        ({"ranks": 2, "batch": 3}, "take 4"),
        ({"shard": "half"}, "none, full or hybrid"),
        ({"ranks": 4, "shard": "hybrid", "per_host": 3, "batch": 4}, "take shard='full'"),
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
        Setting(backend="two_calls").for_model(SHAPE, "diff_v2")


@pytest.mark.parametrize("backend", ["standard", "fused_cpu", "fused_triton", "unequal", "materialised"])
def test_a_backend_that_is_asked_for_is_planned_on_every_machine(backend: str) -> None:
    for machine in (None, *MACHINES):
        assert Setting(backend=backend, machine=machine).for_model(SHAPE, "diff_v1").backend == backend


@pytest.mark.parametrize(
    ("text", "name"),
    [("fused", "fused_cpu"), ("Fused", "fused_cpu"), ("triton", "fused_triton"), ("materialized", "materialised")],
)
def test_older_and_shorter_names_of_a_backend_are_understood(text: str, name: str) -> None:
    assert Setting(backend=text).backend == name


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
def test_auto_is_the_backend_that_serves_on_the_machine(machine: Machine) -> None:
    served = {name: Setting(machine=machine).for_model(SHAPE.grouped(3), name).backend for name in VARIANTS}
    if machine.name in ("Apple M2", "DDR5 desktop", "Raspberry Pi 5"):
        v1 = v2 = "fused_cpu"
    else:
        v1, v2 = "fused_triton", "fused_triton" if machine.name == "H100 SXM" else "standard"
    # Nobody has measured V2's rule with shared noise heads on a GPU.
    shared = "fused_cpu" if v1 == "fused_cpu" else "standard"
    plain = dict.fromkeys(("softmax", "gated"), "standard")
    assert served == plain | {"diff_v1": v1, "diff_v2": v2, "diff_gda": v1, "diff_gda_v2": shared}


def test_auto_is_the_standard_call_where_the_triton_kernel_does_not_serve() -> None:
    def served(shape: ModelShape = SHAPE, attention: str = "diff_v1", **changes: object) -> str:
        return Setting(**changes).for_model(shape, attention).backend

    assert served() == served(precision="autocast") == "fused_triton"
    assert served(precision="float32") == "standard"
    # V1's values are twice as wide as a head.
    assert served(replace(SHAPE, head_dim=128)) == "fused_triton"
    assert served(replace(SHAPE, head_dim=130)) == "standard"
    assert served(machine=Machine("old card", chip="sm_70")) == "standard"
    # V2 where the standard call was measured to be faster, or nothing was.
    wide = replace(SHAPE, head_dim=128)
    long = {"context": 8193, "shape": wide}
    assert served(attention="diff_v2", context=8192, shape=wide) == "fused_triton"
    assert served(attention="diff_v2", **long) == served(attention="diff_v2", machine="a100") == "standard"
    assert served(attention="diff_v2", shape=replace(SHAPE, head_dim=130)) == "standard"
    # Integers are not trained, so what counts is reading a prompt.
    integers = Precision("int4", "bf16", "bf16", "bf16", "bf16")
    assert served(attention="diff_v2", precision=integers, **long) == "fused_triton"
    # Nothing is known of where it runs.
    assert served(machine=None) == "standard"

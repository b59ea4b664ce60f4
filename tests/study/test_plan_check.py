import json
from pathlib import Path

import pytest
import torch

from benchmarks import plan_memory
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.fused import serving_backend
from diffattn.plan.activations import layer, norm
from diffattn.plan.hardware import Machine, load_machine
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory
from diffattn.plan.setting import Precision, Setting
from diffattn.plan.shape import ModelShape
from diffattn.study.measured_machine import measure_machine
from diffattn.study.plan_check import Subject, all_pairs_flops, measure_plan
from diffattn.variants import VARIANTS

# Tied with few symbols, where layers decide, and untied with many, where the logits do.
GROUPED = ModelShape(
    hidden_size=192, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=480, vocab_size=301
)
UNTIED = ModelShape(
    hidden_size=128, num_layers=3, num_heads=4, intermediate_size=320, vocab_size=4099, tie_word_embeddings=False
)
INTEGERS = Precision("int4", "bf16", "bf16", "bf16", "bf16")
MACHINE = Machine("toy", {"fp32": 1e11, "bf16": 1e11}, bandwidth=1e10, disk=1e9)
ROWS = Path(plan_memory.__file__).with_name("results") / "plan_memory.jsonl"
PAGE = Path(plan_memory.__file__).parents[1] / "docs" / "plan.md"


def runs(attention: str, precision: str, backend: str) -> bool:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return (
        backend != "fused_cpu"
        or VARIANTS[attention].maps == 1
        or serving_backend(attention, "cpu", dtype, 32) == "fused_cpu"
    )


@pytest.mark.parametrize(
    ("shape", "attention", "precision", "backend", "checkpointing"),
    [
        (GROUPED, "softmax", "fp32", "standard", False),
        (GROUPED, "diff_v1", "fp32", "fused_cpu", False),
        (GROUPED, "diff_v1", "autocast", "standard", True),
        (GROUPED, "diff_v1", "fp32", "materialised", False),
        (GROUPED, "diff_v2", "bf16", "fused_cpu", True),
        (GROUPED, "diff_gda", "fp32", "fused_cpu", False),
        (GROUPED, "diff_gda", "bf16", "standard", True),
        (GROUPED, "diff_gda_v2", "autocast", "standard", False),
        (GROUPED, "diff_gda_v2", "bf16", "fused_cpu", False),
        (GROUPED, "diff_gda_v2", "fp32", "materialised", False),
        (UNTIED, "softmax", "autocast", "standard", True),
        (UNTIED, "diff_v1", "bf16", "fused_cpu", False),
        (UNTIED, "diff_v2", "autocast", "fused_cpu", False),
        (UNTIED, "diff_v2", "fp32", "standard", True),
        (GROUPED, "gated", "autocast", "standard", False),
        (UNTIED, "gated", "fp32", "materialised", False),
    ],
)
def test_the_real_model_is_as_predicted(shape, attention, precision, backend, checkpointing):
    if not runs(attention, precision, backend):
        pytest.skip("no compiled kernel")
    setting = Setting(batch=2, context=192, precision=precision, backend=backend, checkpointing=checkpointing)
    rows = measure_plan(shape, attention, setting, machine=MACHINE, repeats=1)
    assert {"parameters", "cache", "disk"} <= {row.what for row in rows if row.exact}
    assert ("forward" in {row.what for row in rows}) == (precision != "autocast")
    assert len([row for row in rows if row.unit == "seconds"]) == 4
    for row in rows:
        assert list(row.to_json()) == ["what", "unit", "predicted", "measured", "ratio", "exact"]
        assert row.ratio == row.predicted / row.measured
        if row.exact:
            assert row.predicted == row.measured, row
        elif row.unit == "bytes":
            assert 0.9 < row.ratio < 1.1, row
        else:
            assert row.predicted > 0
            assert row.measured > 0


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_autograd_saves_what_is_counted(attention, precision):
    """The storages that autograd keeps, the parameters apart, against the sum of the model's own tensors."""
    for backend in ("fused_cpu", "standard", "materialised"):
        if not runs(attention, precision, backend):
            continue
        B, T, shape = 2, 37, GROUPED
        subject = Subject(shape, attention, Setting(batch=B, context=T, precision=precision, backend=backend))
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), subject.autocast():
            subject.model.train()(subject.ids, labels=subject.ids)
        for parameter in subject.model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

        size, autocast = (4 if precision == "fp32" else 2), precision == "autocast"
        one = layer(shape, attention, backend=backend, size=size, autocast=autocast)
        predicted = shape.num_layers * (one.token * B * T + one.position * T + one.scores * B * T * T)
        # Final norm, log-softmax, labels and ids, cosines and sines.
        predicted += (norm(shape.hidden_size, size, autocast, 1) + 4 * shape.vocab_size + 16) * B * T
        predicted += 0 if autocast else 2 * size * shape.head_dim * T
        if autocast:
            # Copies of the matrices for the products.
            predicted += 2 * sum(p.numel() for p in subject.model.parameters() if p.dim() == 2)
        assert predicted == pytest.approx(measured, rel=0.005), (backend, predicted / measured)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_inference_is_as_predicted(precision):
    forms = (
        ("softmax", "standard", GROUPED, 3),
        ("diff_v1", "fused_cpu", GROUPED, 1),
        ("diff_v1", "standard", UNTIED, 3),
        ("diff_v2", "fused_cpu", UNTIED, 1),
        ("diff_v2", "standard", GROUPED, 3),
        ("diff_v1", "materialised", UNTIED, 3),
        ("gated", "standard", GROUPED, 3),
    )
    for attention, backend, shape, batch in forms:
        if not runs(attention, precision, backend):
            continue
        setting = Setting(batch=batch, context=160, precision=precision, backend=backend)
        subject = Subject(shape, attention, setting)
        for predict, measured in ((prefill_memory, subject.prefill()[0]), (decoding_memory, subject.decoding()[0])):
            ratio = predict(shape, attention, setting).total / measured
            print(precision, predict.__name__, attention, backend, round(ratio, 4))
            assert 0.9 < ratio < 1.1, (predict.__name__, attention, setting, ratio)


def test_known_wrong_models_of_memory_are_noticed():
    """The bound of 10% is tighter than what each of these would get wrong."""
    real = {"batch": 2, "context": 192, "precision": "fp32", "backend": "standard"}
    measured = Subject(GROUPED, "diff_v1", Setting(**real)).training()[0]

    def ratio(attention="diff_v1", **changes):
        return training_memory(GROUPED, attention, Setting(**real | changes)).total / measured

    assert 0.97 < ratio() < 1.03
    assert ratio(backend="materialised") > 1.1
    assert ratio("softmax") < 0.9
    assert ratio(precision="bf16") < 0.9
    assert ratio(checkpointing=True) < 0.9
    assert ratio(batch=1) < 0.9


def test_what_does_not_run_is_refused():
    for change in ({"precision": "mixed"}, {"backend": "two_calls"}, {"precision": INTEGERS}):
        with pytest.raises(ConfigError, match="wanted for a model that is built, one of") as caught:
            Subject(GROUPED, "diff_v1", Setting(**{"context": 8, "precision": "fp32"} | change))
        assert "\n" not in str(caught.value)


def test_auto_is_what_serves_on_this_machine():
    for attention in ("softmax", "diff_v1"):
        subject = Subject(GROUPED, attention, Setting(context=8, precision="fp32", machine="H100 SXM"))
        assert subject.setting.backend == serving_backend(attention, "cpu", torch.float32, 32)
        assert subject.setting.machine is None


def test_no_kernel_is_said(monkeypatch):
    monkeypatch.setattr("diffattn.study.plan_check.serving_backend", lambda *_: "standard")
    with pytest.raises(UnsupportedError, match="diffattn doctor"):
        Subject(GROUPED, "diff_v1", Setting(context=8, precision="fp32", backend="fused_cpu"))


def test_the_machine_is_measured_into_a_file_that_the_planner_reads(tmp_path):
    machine = measure_machine(size=128, megabytes=2, repeats=1)
    file = tmp_path / "here.json"
    file.write_text(json.dumps(machine.to_json()))
    assert load_machine(file) == machine
    assert min(*machine.flops.values(), machine.bandwidth, machine.disk, machine.memory) > 0
    # Bound by its FLOPs, then by its bytes.
    assert machine.seconds(3 * machine.flops["bf16"], 2 * machine.bandwidth, "bf16") == pytest.approx(3)
    assert machine.seconds(3 * machine.flops["fp32"], 5 * machine.bandwidth, "fp32") == pytest.approx(5)


def test_all_pairs_are_twice_the_causal_ones_without_the_diagonal():
    """Attention's part over all pairs, against T² products by hand: two of width W for each of N heads and layers."""
    for attention, heads, width in (("softmax", 8, 32), ("diff_v1", 8, 64), ("diff_v2", 16, 32)):
        linear = all_pairs_flops(GROUPED, attention, batch=1, context=1) - 4 * 4 * heads * width
        for batch, T in ((1, 5), (3, 7)):
            found = all_pairs_flops(GROUPED, attention, batch=batch, context=T)
            assert found == batch * (T * linear + T * T * 4 * 4 * heads * width)


def test_the_measured_rows_are_predicted():
    """The rows of the benchmark, against the planner as it is now."""
    rows = plan_memory.read(ROWS)
    assert set(plan_memory.design()) <= rows.keys()
    assert len(ROWS.read_text(encoding="utf-8").splitlines()) == len(rows)
    for case, measured in rows.items():
        assert 0.9 < case.predicted() / measured < 1.1, case
    trained = [case for case in rows if case.phase == "training"]
    for field, levels in {
        "shape": set(plan_memory.SHAPES),
        "attention": {"softmax", "diff_v1", "diff_v2"},
        "context": {512, 2048},
        "precision": {"fp32", "autocast", "bf16"},
        "backend": {"fused_cpu", "standard", "materialised"},
        "checkpointing": {False, True},
    }.items():
        assert {getattr(case, field) for case in trained} == levels, field
    assert {case.phase for case in rows} == set(plan_memory.PHASES)
    assert len({(case.precision, case.context, case.checkpointing) for case in trained}) == 12


def test_the_page_has_the_table_of_the_rows():
    table = plan_memory.table(plan_memory.read(ROWS))
    assert table in PAGE.read_text(encoding="utf-8"), table

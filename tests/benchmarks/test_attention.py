"""The benchmark of attention measures what it says: cases, FLOPs, gates, rows. A stand-in takes the kernel's place."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention
from benchmarks.attention_cases import ENTRIES, HEADS, PHASES, WIDTH, Call, Entry, Problem, executed_flops
from diffattn import diff_attention
from diffattn.ops.dispatch import BACKENDS

ROOT = Path(__file__).parents[2]
TOKENS = 17
DECODE = Problem("decode", "float32", 1, TOKENS)
TRAINING = Problem("forward_backward", "float32", TOKENS, TOKENS)
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fused_cpu", BACKENDS["standard"])


def definition(entry: Entry, *arguments: Tensor) -> Tensor:
    if entry.name == "softmax":
        q, k, v, _ = arguments
        arguments = (q, k, q, k, v, torch.zeros(()))
    elif entry.name == "v1_diffllama":
        q, k, v, lam = arguments
        (q1, q2), (k1, k2), v = q.chunk(2, 2), k.chunk(2, 2), torch.cat(v.chunk(2, 2), dim=-1)
        arguments = (q1, k1, q2, k2, v, lam)
    return diff_attention(*arguments, backend="reference")


@EVERY
@pytest.mark.parametrize("problem", [DECODE, TRAINING], ids=lambda problem: problem.phase)
def test_every_case_is_the_definition(entry: Entry, problem: Problem) -> None:
    call = Call(entry, problem)
    expected = definition(entry, *call.arguments)
    torch.testing.assert_close(call.output, expected.detach(), atol=1e-5, rtol=1e-5)
    # The keys and values of a token are as many numbers as softmax's.
    numbers = {id(x): x[0, 0].numel() for x in call.arguments[:-1]}
    assert sum(numbers.values()) == (entry.queries + 2 * entry.shape.num_kv_heads) * WIDTH
    if problem is TRAINING:
        wanted = torch.autograd.grad(expected, call.inputs, call.d_output)
        for gradient, definitions in zip(call.forward_backward(), wanted, strict=True):
            torch.testing.assert_close(gradient, definitions, atol=1e-4, rtol=1e-4)


@EVERY
def test_executed_flops_are_those_that_torch_counts(entry: Entry) -> None:
    # Per query-key pair and pair of baseline heads 8d and 12d, backward 20d and 32d: every product counted. Where four
    # heads share their noise, a quarter of its scores and of what is made of them.
    fused = {"v1_fused": (8, 28), "v1_grouped_fused": (8, 28), "v2_fused": (12, 44), "gda_fused": (6.5, 22)}
    if entry.name in fused:
        forward, both = fused[entry.name]
        assert executed_flops(entry, DECODE) == forward * WIDTH * HEADS // 2 * TOKENS
        assert executed_flops(entry, TRAINING) == both * WIDTH * HEADS // 2 * TOKENS * (TOKENS + 1) // 2
        return
    # torch counts the products of its plain form, which computes masked pairs too and recomputes no scores: two
    # products forward and four backward, where a flash kernel does five.
    with sdpa_kernel(SDPBackend.MATH):
        # Of unequal widths d and 2d a pair of maps is 12d forward, and 24d and 28d backward.
        ratio = (9, 10) if entry.name == "v1_unequal" else (6, 7)
        for problem, torchs, flashs in ((DECODE, 1, 1), (TRAINING, *ratio)):
            call = Call(entry, problem)
            with FlopCounterMode(display=False) as counter:
                call()
            counted = counter.get_total_flops() * flashs * problem.pairs
            assert executed_flops(entry, problem) * torchs * problem.queries * problem.keys == counted


@pytest.mark.parametrize("gate", sorted({entry.gate for entry in ENTRIES}))
def test_gates_exist(gate: str) -> None:
    path, name = gate.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> list[dict]:
    out = tmp_path / "rows.jsonl"
    small = ["--threads", str(torch.get_num_threads()), "--contexts", "32", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["attention", *small, *options])
    attention.main()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_a_run_gives_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    machine, *rows = run(monkeypatch, tmp_path, "--dtypes", "float32")
    assert machine["matmul_flops_per_second"] > 0
    assert machine["copy_large"]["bytes_per_second"] > 0
    wanted = [(phase, entry.name) for phase in PHASES for entry in ENTRIES if phase in entry.phases]
    wanted[-5:-5] = [("memory", entry.name) for entry in ENTRIES]
    assert [(row["phase"], row["case"]) for row in rows] == wanted
    for row in rows:
        assert {"problem", "dtype", "gate", "command", "versions", "machine"} <= set(row)
        ratio = row["ratio_to"]["softmax"]
        assert ratio["p20"] <= ratio["median"] <= ratio["p80"]
        limited = row["case"] in ("v1_fused", "v2_fused") and (row["phase"], row["case"]) != ("decode", "v2_fused")
        if row["case"] == "gda_fused" and row["phase"] != "memory":
            assert ("kept" in row["ratio_to"]["v1_grouped_fused"]) == (row["phase"] == "forward")
        assert ("at_most" in ratio) == ("kept" in ratio) == limited
        if row["phase"] == "memory":
            # Output and the gradient of the queries, and those of as many keys and values where no heads share them.
            least = 4 if row["case"] not in ("v1_grouped_fused", "gda_fused") else 2
            assert row["extra_peak_bytes"] >= row["output_and_gradient_bytes"] >= least * 32 * HEADS * WIDTH * 4
        else:
            assert min(row["rounds"], row["executed_flops"], row["executed_flops_per_second"]) > 0
        if row["phase"] == "decode":
            heads = HEADS // 4 if row["case"] in ("v1_grouped_fused", "gda_fused") else HEADS
            assert row["bytes_read"] == 2 * 4096 * heads * WIDTH * 4
            assert row["percent_of_copy"] > 0
    table = capsys.readouterr().err
    assert all(phase in table for phase in (*PHASES, "memory"))


def test_a_refused_case_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sentence = "fused_cpu: no compiler"
    monkeypatch.setitem(BACKENDS, "fused_cpu", BACKENDS["standard"]._replace(supports=lambda call: sentence))
    _, *rows = run(monkeypatch, tmp_path, "--dtypes", "bfloat16", "--phases", "decode")
    assert [row.get("unsupported") for row in rows] == [None, *[sentence] * 4]


def test_a_run_of_some_cases_has_softmax_beside_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--dtypes", "float32", "--phases", "decode", "--cases", "v1_grouped_fused", "gda_fused")
    _, *rows = run(monkeypatch, tmp_path, *options)
    assert [row["case"] for row in rows] == ["softmax", "v1_grouped_fused", "gda_fused"]

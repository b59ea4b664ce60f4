"""What `make portable` says of exported models in onnxruntime under qemu: which answers it takes, and which not."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools import portability_onnx
from tools.portability_onnx import BOARDS, ROOT, Answers, compared, told


def answers(seed: int = 0) -> Answers:
    logits = np.random.default_rng(seed).normal(size=(2, 3, 512))
    return {"logits": logits, "text": logits.argmax(-1)}


def off(by: float, text: int = 0) -> Answers:
    """The answers with an error, and a token of the text that is another one."""
    exact = answers()
    noise = np.random.default_rng(7).normal(size=exact["logits"].shape)
    return {"logits": exact["logits"] + by * noise, "text": exact["text"] + np.eye(2, 3, dtype=int) * text}


@pytest.mark.parametrize(
    ("bits", "here", "there", "passed"),
    [
        (32, off(1e-6), off(1.2e-6), True),
        (32, off(1e-6), off(1e-4), False),
        (32, off(1e-6), off(1e-6, text=1), False),
        # With rounded weights the error of this machine is the limit, and a text may differ.
        (8, off(0.03), off(0.031, text=1), True),
        (8, off(0.03), off(0.04), False),
        (4, off(0.3), answers(seed=1), False),
        (4, off(0.3), {name: one[:, :, ::-1] if one.ndim == 3 else one for name, one in answers().items()}, False),
    ],
)
def test_answers_are_held_to_torchs(
    bits: int, here: Answers, there: Answers, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portability_onnx, "answers", lambda folder: here)
    np.savez(tmp_path / "answers.npz", **there)
    torch_logits = {"float64": answers()["logits"], "float32": off(1e-6)["logits"]}
    assert compared("diff_v2", bits, torch_logits, tmp_path)["passed"] is passed


def test_the_rows_say_what_the_page_says_of_them() -> None:
    lines = (ROOT / "benchmarks/results/portability.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["case"].startswith("onnxruntime, ")]
    assert [row["case"] for row in rows] == [f"onnxruntime, {name}, qemu {one.qemu}" for name, one in BOARDS.items()]
    for row in rows:
        assert row["passed"]
        for model in row["models"]:
            assert model["same_text"] or model["bits"] < 32
            assert model["error"] <= (1.03 * model["error_here"] if model["bits"] < 32 else model["at_most"])
    of_8_bits = [
        model["error"] / model["error_here"] for row in rows[1:] for model in row["models"] if model["bits"] == 8
    ]
    assert 0.7 < min(of_8_bits) <= max(of_8_bits) < 0.8


def test_the_emulated_system_tells_of_the_processor_and_then_of_its_own(tmp_path: Path) -> None:
    midr = tmp_path / "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"
    midr.parent.mkdir(parents=True)
    midr.write_text("own")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("own")
    with told(BOARDS["Raspberry Pi 4"], tmp_path):
        # Of a Cortex-A72 r0p1.
        assert midr.read_text() == "0x00000000410fd081\n"
        said = (tmp_path / "proc/cpuinfo").read_text()
        assert "CPU part\t: 0xd08\n" in said
        assert "asimddp" not in said
    assert (midr.read_text(), (tmp_path / "proc/cpuinfo").read_text()) == ("own", "own")

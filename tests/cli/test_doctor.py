import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.machine_rows import machine_row
from torch._subclasses.fake_tensor import FakeTensorMode

from diffattn.cli.main import main
from diffattn.ops.cpu import build, compiling
from diffattn.ops.triton import configs
from diffattn.ops.triton import operator as fused_triton
from diffattn.results.machine import MachineRow
from diffattn.study import machine_benchmark


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a kernel, an empty cache, and sources that compile in a moment."""
    for name in ("CXX", "DIFFATTN_FUSED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "_load_and_ask", lambda path: False)
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)
    (tmp_path / "one.cpp").write_text("int one() { return 1; }\n")


DTYPES = ["float32", "bfloat16", "float16"]


def facts(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict:
    assert main(["doctor", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_before_and_after_the_build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = facts(capsys)
    assert before["fused_cpu"]["pending"]
    assert "not compiled yet" in before["fused_cpu"]["reasons"]["float32"]
    assert not (tmp_path / "cache").exists()
    after = facts(capsys, "--build")
    assert after["build_failure"] is None
    assert after["fused_cpu"]["active"] == ["float32", "bfloat16", "float16"]
    assert after["fused_cpu"]["reasons"] == {}
    assert after["diff_attention"] == before["diff_attention"] == dict.fromkeys(DTYPES, "fused_cpu")
    assert after["model_attention"] == dict.fromkeys(DTYPES, "diff_fused")
    assert after["cache"]["bytes"] > Path(after["fused_cpu"]["path"]).stat().st_size > before["cache"]["bytes"] == 0
    assert after["versions"]["torch"] == torch.__version__


def test_for_a_person(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--build"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "fused kernel, float32: active\n" in printed.err
    assert "fused kernel, float16: active\n" in printed.err
    assert "fused kernel's products: in float32, also of bfloat16 and float16: this processor has none" in printed.err
    assert f"cache folder: {tmp_path}/cache, " in printed.err
    assert printed.err.endswith(" MB, can be written\n")
    assert f"{torch.get_num_threads()} threads" in printed.err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> MachineRow:
    """What a measurement that takes no time gives."""
    row = machine_row()
    monkeypatch.setattr(machine_benchmark, "benchmark_machine", lambda on_stage: row)
    return row


def test_a_benchmark_is_one_line_on_stdout_and_a_table_for_a_person(
    capsys: pytest.CaptureFixture[str], measured: MachineRow
) -> None:
    assert main(["doctor", "--benchmark"]) == 0
    printed = capsys.readouterr()
    said = printed.err.split()
    assert printed.out.count("\n") == 1
    assert MachineRow.from_json(json.loads(printed.out)) == measured
    assert "memory: reads 10 GB/s, copies 11 GB/s; disk: 0.09 GB/s; products: float32 70 GFLOP/s" in " ".join(said)
    assert re.search(r"onnxruntime +diff_v2 +8 +writing behind 2,048 tokens +57 +50%", printed.err), printed.err
    assert "is not installed" not in printed.err


def test_a_benchmark_with_json_is_part_of_the_one_object(
    capsys: pytest.CaptureFixture[str], measured: MachineRow
) -> None:
    assert MachineRow.from_json(facts(capsys, "--benchmark")["benchmark"]) == measured
    assert "benchmark" not in facts(capsys)


def test_a_benchmark_without_onnxruntime_says_what_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = machine_row(onnxruntime=None, speeds=machine_row().speeds[:4])
    monkeypatch.setattr(machine_benchmark, "benchmark_machine", lambda on_stage: row)
    assert main(["doctor", "--benchmark"]) == 0
    assert "onnxruntime is not installed, so only torch was measured: pip install 'diffattn[onnx]'" in (
        capsys.readouterr().err.replace("\n", " ")
    )


def test_a_cache_folder_that_cannot_be_written_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert facts(capsys)["cache"]["unwritable"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "one.cpp"]
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "one.cpp" / "cache"))
    assert facts(capsys)["cache"]["unwritable"] == "Not a directory"
    assert main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("cache folder: "))
    assert line.endswith("cannot be written (Not a directory): name a folder that can be with DIFFATTN_CACHE")


def test_a_failed_build_is_status_1_and_tells_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/absent/g++")
    result = facts(capsys, "--build", status=1)
    assert "/absent/g++ not found" in result["build_failure"]
    assert result["diff_attention"] == dict.fromkeys(DTYPES, "standard")
    assert result["model_attention"] == dict.fromkeys(DTYPES, "diff_fused, by the standard call")
    assert main(["doctor", "--build"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "diffattn: fused_cpu: the kernel could not be compiled (/absent/g++ not found); wanted a kernel"
    )
    assert "install a C++20 compiler" in last
    assert main(["doctor"]) == 0


def test_switched_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    result = facts(capsys)
    assert set(result["fused_cpu"]["reasons"].values()) == {"fused_cpu: switched off by DIFFATTN_FUSED=0"}
    assert result["diff_attention"]["float32"] == "standard"


def test_on_windows_one_line_says_what_serves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().err
    assert said.count("the kernel serves Linux and macOS, not win32, where the standard path serves\n") == 1
    assert "diff_attention on CPU, float32: standard\n" in said
    assert "install a C++20 compiler" not in said
    assert "GPU: none that PyTorch can use\n" in said or "GPU cuda:0: " in said


GPU_CASES: dict[str, tuple[str, str | None, list[str]]] = {
    "H100": (
        "sm_90",
        "3.6.0",
        [
            "GPU cuda:0: a card",
            "diff_attention and models on cuda:0, float32: standard (fused_triton: float32 inputs are not supported, "
            "because GPUs multiply it fast only with a rounding to TF32; it serves bfloat16 and float16)",
            "diff_attention and models on cuda:0, bfloat16, float16: fused_triton",
        ],
    ),
    "a chip that nobody timed": (
        "sm_80",
        "3.6.0",
        [
            "diff_attention and models on cuda:0, bfloat16, float16: fused_triton; V2 training: standard "
            "(fused_triton: V2 without a mask is left to PyTorch's kernels where nobody has measured which is faster)"
        ],
    ),
    "a chip without a table": (
        "sm_52",
        "3.6.0",
        ["diff_attention and models on cuda:0, bfloat16, float16: standard (fused_triton: a GPU of type sm_52 is not "],
    ),
    "no Triton": (
        "sm_90",
        None,
        [
            "diff_attention and models on cuda:0, bfloat16, float16: standard (fused_triton: Triton is not installed; "
            "install it with pip install triton)"
        ],
    ),
}


@pytest.mark.parametrize("case", GPU_CASES)
def test_a_gpu_is_told_what_serves_it_and_why(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without data that say that they lie on it."""
    chip, triton, lines = GPU_CASES[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    shared = configs.SHARED[configs.TABLES.get(chip, "sm_90")]
    monkeypatch.setattr(configs, "_facts", lambda index: (chip, shared, 100))
    monkeypatch.setattr(fused_triton, "triton_version", lambda: triton)
    with FakeTensorMode():
        (gpu,) = facts(capsys)["gpus"]
        assert main(["doctor"]) == 0
    said = capsys.readouterr().err
    assert [line for line in lines if line not in said] == []
    assert "none that PyTorch can use" not in said
    assert list(gpu["serves"]) == DTYPES
    assert set(gpu["serves"]["float16"]) == {"diff_attention", "models", "reasons"}
    assert set(gpu["serves"]["float16"]["models"]) == {"V1 training", "V1 decoding", "V2 training", "V2 decoding"}


def test_help_needs_no_torch() -> None:
    program = "import sys; from diffattn.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "doctor" in run.stdout

"""`diffattn plan`: what it prints where, what it refuses, and that it starts without torch."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffattn.cli.main import main
from diffattn.plan.answer import plan
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage

PAIR = ("--model", "diff_v1:300K", "--against", "softmax:300K", "--context", "64")


def said(capsys: pytest.CaptureFixture[str], *options: str, status: int = 0) -> tuple[dict[str, Any], str]:
    assert main(["plan", *options]) == status
    out, shown = capsys.readouterr()
    return json.loads(out) if out else {}, shown


def test_the_tables_are_on_stderr_and_nothing_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    found, shown = said(capsys)
    assert found == {}
    assert "diff_v1:6.8B" in shown
    assert "Training peak memory" in shown
    assert "materialised" in shown
    assert "KV cache is the same in every row" in " ".join(shown.split())
    assert "backend: auto (diff_v1:6.8B: fused_triton, softmax:11B: standard)" in " ".join(shown.split())


def test_json_is_what_python_returns(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = said(capsys, *PAIR, "--batch", "3", "--precision", "autocast", "--checkpointing", "--json")
    command = found.pop("command")
    assert command.startswith("diffattn")
    setting = Setting(context=64, batch=3, precision="autocast", checkpointing=True)
    expected = plan("diff_v1:300K", "softmax:300K", setting).to_json()
    del expected["command"]
    assert found == json.loads(json.dumps(expected))


def test_dtypes_take_the_place_of_the_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    found, shown = said(capsys, *PAIR, "--weights-dtype", "int4", "--cache-dtype", "int8", "--machine", "m3", "--json",
                        status=2)  # fmt: skip
    assert "machine 'm3'" in shown
    found, _ = said(capsys, *PAIR, "--weights-dtype", "int4", "--cache-dtype", "int8", "--machine", "m2", "--json")
    precision = found["setting"]["precision"]
    assert (precision["weights"], precision["cache"], precision["activations"]) == ("int4", "int8", "bf16")
    assert found["model"]["estimate"]["training"] is None


def test_sweep_and_fits_are_tables_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    found, shown = said(capsys, *PAIR, "--sweep", "context=1k:4k", "--fits", "64MiB", "--json")
    assert [row["value"] for row in found["sweep"]] == [1024, 1024, 2048, 2048, 4096, 4096]
    assert {row["what"] for row in found["fits"]} == {"parameters", "context", "batch"}
    assert "longest context" in shown
    assert "4,096" in shown


def test_a_machine_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "flops": {"fp32": 1e9, "bf16": 1e9}, "bandwidth": 1e9}))
    found, shown = said(capsys, *PAIR, "--machine", str(file), "--json")
    assert found["setting"]["machine"]["name"] == "mine"
    assert found["model"]["estimate"]["training"]["seconds"] > 0
    assert found["model"]["estimate"]["first_token_seconds"] is None
    assert "first token comes" not in shown


def test_html_is_one_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said(capsys, *PAIR, "--html", str(tmp_path / "new" / "plan.html"))
    text = (tmp_path / "new" / "plan.html").read_text(encoding="utf-8")
    assert "diff_v1:300K" in text
    assert "KV cache is the same in every row" in text
    (tmp_path / "file").write_text("")
    _, shown = said(capsys, *PAIR, "--html", str(tmp_path / "file" / "plan.html"), status=2)
    assert shown.startswith("diffattn: --html")


def test_measure_puts_both_beside_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffattn.study.plan_check as measured

    asked: dict[str, object] = {}

    def measure(
        shape: ModelShape, attention: str, setting: Setting, *, on_stage: OnStage
    ) -> list[measured.MeasuredRow]:
        asked.update(shape=shape, attention=attention, setting=setting)
        row = {"what": "peak of training", "unit": "bytes", "predicted": 110, "measured": 100, "exact": False}
        return [measured.MeasuredRow(**row)]

    monkeypatch.setattr(measured, "measure_plan", measure)
    found, shown = said(capsys, *PAIR, "--measure", "--precision", "fp32", "--json")
    assert asked["setting"] == Setting(context=64, precision="fp32")
    assert (asked["shape"], asked["attention"]) == (ModelShape.preset("300K"), "diff_v1")
    assert found["measured"] == [
        {"what": "peak of training", "unit": "bytes", "predicted": 110, "measured": 100, "ratio": 1.1, "exact": False}
    ]
    assert "1.100×" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", "0"), "context '0'"),
        (("--batch", "-1"), "batch '-1'"),
        (("--machine", "abacus"), "machine 'abacus'"),
        (("--precision", "fp8"), "precision='fp8'"),
        (("--weights-dtype", "int3"), "weights='int3'"),
        (("--backend", "flash"), "backend='flash'"),
        (("--model", "diff_v3:3B"), "did you mean diff_v2"),
        (("--model", "banana"), "model 'banana'"),
        (("--model", ""), "model ''"),
        (("--model", "diff:3B"), "diff_v1 and diff_v2 and diff_gda and diff_gda_v2 fit"),
        (("--machine", ""), "machine ''"),
        (("--machine", "RTX"), "RTX 4090 and RTX 3060 12GB fit"),
        (("--fits", "8"), "memory '8'"),
        (("--fits", "nan"), "memory 'nan'"),
        (("--context", "1e400"), "context '1e400'"),
        (("--context", "9" * 400), "context '9999"),
        (("--precision", ""), "precision=''"),
        (("--precision", "fp16"), "precision='fp16'"),
        (("--cache-dtype", "int"), "int8 and int4 fit"),
        (("--backend", ""), "backend=''"),
        (("--sweep", "length=1:2"), "sweep 'length=1:2'"),
        (("--against", "softmax:nope"), "size 'nope'"),
        (("--tp", "5"), "tp=5"),
        (("--ranks", "0"), "ranks=0"),
        (("--sweep", "context=4k"), "sweep 'context=4k'"),
        (("--fits", "8 bananas"), "memory '8 bananas'"),
        (("--fits", "1MiB"), "wanted more"),
        (("--measure", "--precision", "mixed"), "wanted for a model that is built, one of float32, autocast, bfloat16"),
        (("--measure", "--cache-dtype", "int8"), "pass one of them as --dtype alone"),
        (("--measure", "--precision", "bf16", "--batch", "64"), "take a smaller model"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    _, shown = said(capsys, *options, status=2)
    assert words in shown
    assert shown.count("\n") == 1


def test_names_are_found_in_any_case_and_the_choice_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found, shown = said(
        capsys, "--model", "DIFF-V2:300k", "--context", " 64 ", "--machine", "nvidia rtx 3060",
        "--precision", "AutoCast", "--backend", "Mat", "--weights-dtype", "BFloat16", "--json",
    )  # fmt: skip
    setting = found["setting"]
    assert setting["machine"]["name"] == "RTX 3060 12GB"
    assert (setting["precision"]["weights"], setting["backend"], setting["context"]) == ("bf16", "materialised", 64)
    assert found["model"]["name"] == "diff_v2:300K"
    assert found["against"] is None
    assert shown.startswith("machine: RTX 3060 12GB; context: 64; batch: 1; precision: weights bf16,")


def test_a_size_alone_is_planned_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    found, shown = said(capsys, "--model", "3M", "--context", "64", "--json")
    assert found["model"]["attention"] == "diff_v1"
    assert "'3M' is planned as diff_v1:3M" in shown
    assert "softmax:11B" not in shown


def test_a_page_of_one_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said(capsys, "--model", "softmax:300K", "--context", "64", "--html", str(tmp_path / "plan.html"))
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "A model before it is built" in text
    assert '<th scope="col">ratio</th>' not in text
    assert 'class="quotient"' not in text


def test_the_process_imports_no_torch_and_ends_within_a_second() -> None:
    code = (
        "import sys; from diffattn.cli.main import main; status = main(['plan', '--json']); "
        "heavy = {'torch', 'transformers', 'numpy', 'altair', 'vl_convert'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(status or bool(heavy))"
    )
    seconds = []
    # Seconds of the processor: other work on the same cores delays a run, and slows it.
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sentences"]
    assert min(seconds) < 1

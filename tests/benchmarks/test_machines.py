"""Rows of people's machines: what is taken, and that docs/small_machines.md says what the rows and the planner say."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.machine_rows import machine_row

from benchmarks import machines
from diffattn.cli.arguments import parse
from diffattn.cli.main import load
from diffattn.errors import ConfigError
from diffattn.plan.estimate import estimate
from diffattn.plan.hardware import MACHINES
from diffattn.plan.named_model import parse_model
from diffattn.plan.setting import Setting, precision_of

ROOT = Path(__file__).parents[2]
LINE = json.dumps(machine_row().to_json())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty list of rows, and a page of its own."""
    monkeypatch.setattr(machines, "ROWS", tmp_path / "machines.jsonl")
    monkeypatch.setattr(machines, "PAGE", tmp_path / "page.md")
    begins = [machines.BEGIN.format(name) for name in machines.tables()]
    (tmp_path / "page.md").write_text("\n\n".join(f"{begin}\n\nold\n\n{machines.END}" for begin in begins))
    return tmp_path / "machines.jsonl"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["machines", *arguments])
    machines.main()


def test_the_page_has_the_tables_that_the_rows_and_the_planner_make() -> None:
    page = machines.PAGE.read_text(encoding="utf-8")
    assert machines.page_with(page, machines.tables()) == page, "python -m benchmarks.machines writes them anew"
    assert machines.read()


def test_what_others_reached_stands_beside_what_the_planner_allows() -> None:
    page = " ".join(machines.PAGE.read_text(encoding="utf-8").split())
    setting = Setting(context=128, machine=machines.BOARD, precision=precision_of("fp32", weights="int4"))
    pi, shares = MACHINES[machines.BOARD], []
    for name, allowed, reached in (("llama-3.2-3B", "10.4", 4.88), ("llama-3.1-8B", "4.49", 2.17)):
        model = parse_model(name)
        planned = estimate(model.built, model.attention, setting).decoding.tokens_per_second
        assert planned is not None
        assert f"{planned:.3g}" == allowed
        shares.append(f"{reached / planned:.0%}")
    assert f"allows 10.4 and 4.49: {shares[0]} and {shares[1]}" in page
    assert pi.flops is not None
    assert pi.bandwidth is not None
    assert f"counted by the file, {4.88 * 1.87 * 2**30 / pi.bandwidth:.0%} of the memory's rate" in page
    assert f"11.4 GB/s on each, which is {11.4e9 / pi.bandwidth:.0%}" in page
    # Half as many numbers of 64 bits fit into a register.
    double = pi.flops["fp32"] / 2
    assert f"36.7 of {double / 1e9:.1f} GFLOP/s in float64, which is {36.7e9 / double:.0%}" in page


def test_a_posted_text_is_kept_once_and_shown(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted = tmp_path / "posted.txt"
    posted.write_text(f"### The row\n\n```json\n{LINE}\n```\n\n### What may have held it back\n\nno fan\n")
    run(monkeypatch, str(posted))
    assert machines.read() == [machine_row()]
    page = machines.PAGE.read_text()
    assert "old" not in page
    assert "| 49 | 41 | 0.98 / 1.02 | 81 | 57 | 0.90 / 0.95 | 50% to 50% |" in page
    with pytest.raises(SystemExit, match=r"a row of 'Raspberry Pi 5 Model B Rev 1.0' that is there already"):
        run(monkeypatch, str(posted))
    assert kept.read_text() == LINE + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a text with 0 rows; wanted one"),
        ("hello", "a text with 0 rows; wanted one"),
        (f"{LINE}\n{LINE}", "a text with 2 rows; wanted one"),
        (LINE[:-40], "a row that is no JSON"),
        ('{"benchmark": ' + "[" * 100_000, "a row that is no JSON"),
        (LINE.replace("81.0", "99.0"), "a row that was changed after it was measured"),
        ('{"benchmark": "machine"}', "a row of benchmark 'machine', form None"),
        ('{"benchmark": "machine", "benchmark": "machine"}', "a row that is no JSON"),
    ],
)
def test_what_is_no_row_is_refused_and_nothing_is_kept(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (tmp_path / "posted.txt").write_text(text)
    with pytest.raises(SystemExit, match=f"^benchmarks.machines: {words}") as caught:
        run(monkeypatch, str(tmp_path / "posted.txt"))
    assert "\n" not in str(caught.value)
    assert not kept.exists()


def test_a_file_that_is_not_there_is_one_line(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.machines: 'absent' cannot be read"):
        run(monkeypatch, "absent")


def test_a_name_is_no_markup() -> None:
    row = machine_row(name="<script>|[x](y)`*_")
    (line,) = machines.table([row]).splitlines()[2:]
    assert line.startswith(r"| &lt;script&gt;\|\[x\]\(y\)\`\*\_, aarch64")


def test_a_row_without_onnxruntime_has_dashes() -> None:
    row = machine_row(speeds=machine_row().speeds[:4], onnxruntime=None)
    (line,) = machines.table([row]).splitlines()[2:]
    assert line.endswith("| 49 | 41 | 0.98 / 1.02 | – | – | – | 50% to 50% |")


def test_a_row_of_another_form_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="form 1"):
        machines.found_in(LINE.replace('"form": 1', '"form": 7'))


def test_the_form_asks_for_what_the_command_prints() -> None:
    form: dict[str, Any] = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/machine.yml").read_text(encoding="utf-8"))
    (row,) = (part for part in form["body"] if part.get("id") == "row")
    assert row["validations"] == {"required": True}
    program, verb, *words = shlex.split(machine_row().command)
    assert f"`{program} {verb} {' '.join(words)}`" in row["attributes"]["description"]
    assert form["name"] in machines.PAGE.read_text(encoding="utf-8")
    # The verb has the option; it is not run here.
    parse(verb, load(verb), words)

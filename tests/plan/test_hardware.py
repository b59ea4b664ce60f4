"""Machines: the table, its sources, and JSON files."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.hardware import MACHINES, RATED_DTYPES, GiB, Machine, load_machine

RATES = {"fp32": 1e12, "bf16": 4e12}


def test_every_machine_has_all_rates_and_a_source() -> None:
    assert list(MACHINES) == [machine.name for machine in MACHINES.values()]
    for machine in MACHINES.values():
        assert machine.flops is not None
        assert set(machine.flops) == set(RATED_DTYPES)
        assert None not in (machine.bandwidth, machine.memory, machine.disk)
        assert "disk" in machine.source or "NVMe" in machine.source


def test_cards_have_a_chip_and_processors_have_none(tmp_path: Path) -> None:
    chips = {name: machine.chip for name, machine in MACHINES.items() if machine.chip is not None}
    assert chips == {"H100 SXM": "sm_90", "A100 80GB": "sm_80", "RTX 4090": "sm_89", "RTX 3060 12GB": "sm_86"}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"bandwidth": 1e9, "chip": "sm_120"}))
    assert load_machine(file).chip == "sm_120"
    file.write_text(json.dumps(MACHINES["Apple M2"].to_json()))
    assert load_machine(file) == MACHINES["Apple M2"]


def test_rates_from_the_architecture() -> None:
    """Cores · clock · vectors per cycle · lanes · 2."""
    pi, desktop = MACHINES["Raspberry Pi 5"], MACHINES["DDR5 desktop"]
    assert pi.flops is not None
    assert desktop.flops is not None
    assert pi.flops["fp32"] == 4 * 2.4e9 * 2 * 4 * 2
    assert desktop.flops["fp32"] == pytest.approx(8 * 3.8e9 * 2 * 8 * 2)
    assert desktop.bandwidth == 2 * 8 * 5200e6
    card = MACHINES["RTX 3060 12GB"]
    assert card.flops is not None
    assert card.flops["fp32"] == pytest.approx(3584 * 1.777e9 * 2, rel=0.001)


def test_the_roofline_takes_the_slower_limit() -> None:
    machine = Machine("toy", RATES, bandwidth=1e9)
    assert machine.seconds(8e12, 1e9, "bf16") == 2
    assert machine.seconds(8e12, 1e9, "fp16") == 2
    assert machine.seconds(8e12, 1e9, "fp32") == 8
    assert machine.seconds(8e12, 3e9, "bf16") == 3
    assert machine.read_seconds(1) is None
    assert Machine("unknown").seconds(1, 1, "fp32") is None


@pytest.mark.parametrize(("text", "name"), [("h100", "H100 SXM"), ("H100 SXM", "H100 SXM"), ("a100", "A100 80GB"),
                                            ("rtx-4090", "RTX 4090"), ("raspberrypi5", "Raspberry Pi 5"),
                                            ("RTX 3060", "RTX 3060 12GB"), ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
                                            ("3060", "RTX 3060 12GB"), ("m2", "Apple M2"), ("pi 5", "Raspberry Pi 5"),
                                            (" H100 ", "H100 SXM"), ("desktop", "DDR5 desktop")])  # fmt: skip
def test_names_are_found_however_they_are_spaced(text: str, name: str) -> None:
    assert load_machine(text) is MACHINES[name]


def test_a_file_names_the_machine_and_may_leave_out_what_is_unknown(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"flops": RATES, "bandwidth": 5e10, "memory": 8 * GiB}))
    machine = load_machine(file)
    assert (machine.name, machine.memory, machine.disk) == ("mine", 8 * GiB, None)
    assert machine.flops == {**RATES, "fp16": 4e12}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "wanted a JSON object"),
        ({"speed": 3}, "the unknown key 'speed'"),
        ({"bandwidth": 0}, "bandwidth=0"),
        ({"bandwidth": float("nan")}, "bandwidth=nan"),
        ({"disk": float("inf")}, "disk=inf"),
        ({"memory": 10**400}, "memory="),
        ({"memory": "8GiB"}, "memory='8GiB'"),
        ({"disk": True}, "disk=True"),
        ({"flops": 1e12}, "FLOP/s for fp32 and bf16"),
        ({"flops": {"fp32": 1e12}}, "FLOP/s for fp32 and bf16"),
        ({"flops": {"fp32": 1e12, "bf16": -1}}, "flops of bf16=-1"),
        ({"name": 3}, "name=3"),
        ({"chip": 90}, "chip=90; wanted the name of a GPU's architecture"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, values: Any, words: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words) as caught:
        load_machine(file)
    assert "\n" not in str(caught.value)


def test_no_such_machine(tmp_path: Path) -> None:
    for given, words in (
        ("abacus", "one of H100 SXM"),
        ("absent.json", "No such file"),
        ("", "machine ''; wanted one of"),
        ("  ", "machine '  '; wanted one of"),
        ("NVIDIA", "machine 'NVIDIA'; wanted one of"),
        ("RTX", "RTX 4090 and RTX 3060 12GB fit"),
        ("12", "wanted one of"),
        ("5", "wanted one of"),
        ("H100 PCIe", "wanted one of"),
        (str(tmp_path), "one of H100"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_machine(given)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_machine(tmp_path / "broken.json")
    assert "\n" not in str(caught.value)

"""Slurm's commands, played on this machine: they write down the words that they were called with.

``sbatch`` runs a script at once, for each number of its array, with the variables that Slurm would set by its
``#SBATCH`` lines. ``srun`` runs what ``FAKE_SRUN`` says, by default nothing; ``scontrol`` names the hosts.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

JOB = 4711


def install(folder: Path) -> dict[str, str]:
    """Puts the commands into a folder; returns the variables with which a process finds them and no real ones."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {__file__} {name} "$@"\n')
        program.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return own | {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_LOG": str(folder / "log")}


def calls(folder: Path) -> list[list[str]]:
    """The words of every call of ``srun`` and ``scontrol`` so far."""
    log = folder / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _options(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(found)


def _sbatch(words: list[str]) -> int:
    given = list(itertools.takewhile(lambda word: word.startswith("--"), words))
    script = Path(words[len(given)])
    options = _options(script) | dict(word[2:].split("=", 1) for word in given)
    nodes = options["nodes"]
    variables = {
        "SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": f"node[7-{6 + int(nodes)}]",
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"], "SLURM_GPUS_ON_NODE": options["gpus-per-node"],
    }  # fmt: skip
    array = re.fullmatch(r"(\d+)-(\d+)", options.get("array", ""))
    status = 0
    for number in range(int(array[1]), int(array[2]) + 1) if array else [None]:
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        if number is not None:
            environment["SLURM_ARRAY_TASK_ID"] = str(number)
        # Slurm runs a copy of the script, which lies elsewhere.
        copy = Path(os.environ["FAKE_LOG"]).with_name("slurm_script")
        copy.write_bytes(script.read_bytes())
        status |= subprocess.run(["bash", str(copy), *words[len(given) + 1 :]], env=environment).returncode
    return status


def _main(name: str, words: list[str]) -> int:
    if name == "sbatch":
        return _sbatch(words)
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(json.dumps([name, *words]) + "\n")
    if name == "scontrol":
        if words[:2] == ["show", "hostnames"]:
            print("node7\nnode8")
        return 0
    # In place of this process, as srun passes signals on.
    os.execvp("bash", ["bash", "-c", os.environ.get("FAKE_SRUN", "true"), "srun", *words])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))

"""Holds what the package says, byte for byte, so that moves and renames are seen to change nothing.

After a change that is meant, such as a new option, `python tests/test_goldens.py --write [NAME…]` writes the files of
`tests/goldens/` again; their difference then says what has changed. Floats that depend on the processor and on the
versions of libraries are held for those they were written with, which are the first line of their file.
"""

import contextlib
import difflib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import diffattn
from diffattn.cli.main import main

# All else that is imported from places which may move: one line each.
train_tokenizer = import_module("diffattn.data.tokenizer").train_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
PROCESSOR = "# processor: "
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "lm-eval")


def processor() -> str:
    """Returns all that the last digit of a float may depend on, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = dict(line.partition(":")[::2] for line in reversed(lines) if ":" in line)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    parts = [f"{name} {known.get(name, 'unknown')}" for name in ("model name", "cpu family", "model")]
    parts += [torch.backends.cpu.get_cpu_capability(), *(f"{name} {version(name)}" for name in LIBRARIES)]
    return ", ".join(parts)


def said(*words: str) -> str:
    """Runs the command in this process and returns what it prints on stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    assert status == 0, err.getvalue()
    return out.getvalue()


PAIRS = {
    "v1_6.8B": ("diff_v1:6.8B", "softmax:11B"),
    "v2_6.8B": ("diff_v2:6.8B", "softmax:6.8B"),
    "gated_6.8B": ("gated:6.8B", "softmax:6.8B"),
    "v1_30M": ("diff_v1:30M", "softmax:30M"),
    "v2_830M": ("diff_v2:830M", "diff_v1:830M"),
    "gated_1.4B": ("gated:1.4B", "diff_v2:1.4B"),
    "v1_13.1B": ("diff_v1:13.1B", "softmax:13B"),
    "v2_3B": ("diff_v2:3B", "softmax:3.5B"),
    "softmax_2.8B": ("softmax:2.8B", "gated:2.8B"),
    "v1_180M": ("diff_v1:180M", "diff_v2:180M"),
    "softmax_300K": ("softmax:300K", "diff_v2:3M"),
    "v2_13.1B": ("diff_v2:13.1B", "diff_v1:13.1B"),
}
SETTINGS = (
    ["--fits", "80GiB"],
    ["--context", "1k", "--batch", "8", "--precision", "fp32", "--backend", "materialised", "--machine", "RTX 4090",
     "--checkpointing"],
    ["--context", "32k", "--batch", "4", "--precision", "bf16", "--backend", "fused", "--machine", "A100 80GB",
     "--tp", "2", "--fsdp", "4", "--cache-dtype", "int8", "--sweep", "context=8k:32k"],
    ["--context", "2k", "--batch", "16", "--precision", "autocast", "--backend", "definition", "--machine", "Apple M2",
     "--weights-dtype", "int4", "--sweep", "batch=1:4"],
)  # fmt: skip


def planned(pair: str, folder: Path) -> str:
    model, against = PAIRS[pair]
    told = []
    for setting in SETTINGS:
        words = ["plan", "--model", model, "--against", against, *setting, "--json"]
        told.append(f"# diffattn {shlex.join(words)}\n{said(*words)}")
    return "".join(told)


def fitted(folder: Path) -> str:
    return said("scale", "fit", "figure3a", "--json")


VOCABULARY = 400
TEXT = " ".join(f"Line {number} is about {word}." for number in range(80) for word in ("rain", "a road", "old wine"))
VARIANTS = ("softmax", "diff_v1", "diff_v2", "gated", "dex")


def built(attention: str, *, seed: int = 0) -> torch.nn.Module:
    """Builds a model of a few thousand parameters whose attention is far from uniform."""
    shape = diffattn.ModelShape(
        hidden_size=36, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=10, intermediate_size=43,
        vocab_size=VOCABULARY, max_position_embeddings=512,
    )  # fmt: skip
    if attention != "dex":
        return diffattn.build_pair(shape, attention, seed=seed, initializer_range=0.25).model
    torch.manual_seed(seed)
    config = diffattn.DiffTransformerConfig.from_shape(shape, "dex", dex_heads=[[1, 3], [0]], initializer_range=0.25)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if ".dex." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("dex.annealed"):
            buffer.fill_(0.7)
    return model


def losses(folder: Path) -> str:
    """Returns the loss of each of 20 steps, exact in hexadecimal, by variant and by how attention is computed."""
    lines = []
    for attention in VARIANTS:
        ways = ("diff_fused", "sdpa", "eager") if attention in ("diff_v1", "diff_v2") else ("sdpa", "eager")
        for way in ways:
            model = built(attention).train()
            model.set_attn_implementation(way)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            drawn = torch.Generator().manual_seed(1)
            lines.append(f"# {attention} {way}")
            for _ in range(20):
                # Squares, so that some tokens come often and there is something to learn.
                ids = (torch.rand(4, 48, generator=drawn) ** 2 * VOCABULARY).long()
                loss = model(ids, labels=ids).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                lines.append(loss.item().hex())
    return "\n".join(lines) + "\n"


STUDIES = {
    "retrieval": ["--lengths", "200", "--depths", "0", "1", "--tasks", "1", "1", "2", "2", "--samples", "2"],
    "noise": ["--length", "200", "--depths", "0", "0.5", "--samples", "3"],
    "noise_by_head": ["--length", "200", "--depths", "0", "0.5", "--samples", "3"],
    "icl": ["--shots", "2", "4", "--queries", "3", "--permutations", "2", "--labels", "3"],
    "outliers": ["--tokens", "600", "--context", "100", "--batch-size", "2"],
    "low_bit": ["--bits", "16", "6", "4", "--context", "100", "--samples", "3"],
    "long_context": ["--length", "100", "--samples", "3", "--chunk", "32"],
    "standard": ["--limit", "3"],
}


def measured(study: str, folder: Path) -> str:
    """Returns the result of a study of a model of each variant, without what differs between machines."""
    models = [f"{attention}={folder / attention}" for attention in VARIANTS]
    if not (folder / "text.txt").exists():
        tokenizer = train_tokenizer([TEXT, "The secret number of Lima is 48219. Of Oslo it is 70035."], VOCABULARY)
        for attention in VARIANTS:
            built(attention).save_pretrained(folder / attention)
            tokenizer.save_pretrained(folder / attention)
        (folder / "text.txt").write_text(f"{TEXT}\n<|endoftext|>\n{TEXT} The end.\n", encoding="utf-8")
    words = [*models, "--text", str(folder / "text.txt"), "--device", "cpu", "--json", *STUDIES[study]]
    result = json.loads(said("eval", study, *words))
    for name in ("text", "versions", "command"):
        del result[name]
    for facts in result["models"].values():
        del facts["folders"]
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def shipped(folder: Path) -> str:
    """Returns the names of the files of a model's folder that brings its code along."""
    built("diff_v1").save_pretrained(folder / "remote_code", remote_code=True)
    return "".join(f"{path.name}\n" for path in sorted((folder / "remote_code").iterdir()))


def options(folder: Path) -> str:
    """Returns every verb with the names of its options, read from the help; its texts may change."""
    listed = said("--help").partition("\nverbs:\n")[2].partition("\n\n")[0]
    verbs = re.findall(r"^  (\S+(?: \S+)*)  +\S", listed, re.MULTILINE)
    told = []
    for verb in verbs:
        names = re.findall(r"^ {1,2}(?:-\w, )?(--\w[\w-]*)", said(*verb.split(), "--help"), re.MULTILINE)
        told.append("\n  ".join([verb, *names]) + "\n")
    return "".join(told)


# By name of the file: what makes its text, and whether the processor has a say in it.
HELD: dict[str, tuple[Callable[[Path], str], bool]] = {
    **{f"plan_{pair}": (partial(planned, pair), False) for pair in PAIRS},
    "scale_fit": (fitted, True),
    "losses": (losses, True),
    **{f"eval_{study}": (partial(measured, study), True) for study in STUDIES},
    "remote_code": (shipped, False),
    "options": (options, False),
}


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Sets one thread and 80 columns for as long as it lasts."""
    threads, columns = torch.get_num_threads(), os.environ.get("COLUMNS")
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "80"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("goldens")


@pytest.mark.parametrize("name", HELD)
def test_what_is_said_stays(name: str, folder: Path) -> None:
    make, by_processor = HELD[name]
    expected = (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")
    if by_processor:
        written, _, expected = expected.partition("\n")
        if written != PROCESSOR + processor():
            pytest.skip(f"these floats were written with {written.removeprefix(PROCESSOR)}; this is {processor()}")
    with alike():
        actual = make(folder)
    if actual != expected:
        lines = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "held", "said", n=1, lineterm="")
        pytest.fail(f"{name} has changed:\n" + "\n".join(list(lines)[:40]), pytrace=False)


def test_no_golden_is_left_that_nothing_makes() -> None:
    assert {path.name for path in GOLDENS.iterdir()} == {f"{name}.txt" for name in HELD}


WITHOUT_DIFFATTN = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffattn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.arange(24).view(2, 12)
found = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    with torch.no_grad():
        found[name] = model(ids).logits
assert not [name for name in sys.modules if name.partition(".")[0] == "diffattn"]
save_file(found, f"{sys.argv[1]}/found.safetensors")
"""


def test_a_folder_with_its_code_loads_without_the_package_and_gives_the_same_logits(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = {}
    with alike(), torch.no_grad():
        for attention in VARIANTS:
            model = built(attention).eval()
            model.save_pretrained(tmp_path / attention, remote_code=True)
            # The call that is there without the package's kernel.
            model.set_attn_implementation("sdpa")
            expected[attention] = model(torch.arange(24).view(2, 12)).logits
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFATTN, str(tmp_path), *VARIANTS],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    for attention in VARIANTS:
        assert torch.equal(found[attention], expected[attention])


def write(names: list[str]) -> None:
    GOLDENS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, alike():
        for name in names or HELD:
            make, by_processor = HELD[name]
            key = f"{PROCESSOR}{processor()}\n" if by_processor else ""
            (GOLDENS / f"{name}.txt").write_text(key + make(Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit("nothing given; wanted --write and perhaps names of goldens: python tests/test_goldens.py --write")
    write(sys.argv[2:])

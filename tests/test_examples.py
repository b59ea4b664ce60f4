"""The scripts of ``examples/``, as a person runs them, at sizes that take seconds."""

import importlib
from pathlib import Path

import pytest
from support import sharded_examples
from support.ranks import run_ranks
from support.small_comparison import write_shape, write_text
from support.small_run import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from diffattn.data.packing import prepare_data
from diffattn.model.modeling import DiffTransformerForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    # The text's alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")


def test_operation(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("operation")
    assert float(capsys.readouterr().out.split(": ")[1]) < 1e-5


def test_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = importlib.import_module("pair")
    differences = pair.main(str(tmp_path / "runs"), write_text(tmp_path), SHAPE, steps=3, seeds=2)
    assert len(differences) == 2
    assert capsys.readouterr().out.count("nats per token") == 2
    assert (tmp_path / "runs/softmax-seed1/result.json").exists()


def test_llama_to_diff(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    tokenizer = prepare_data(text, vocab_size=SHAPE.vocab_size, context=32).tokenizer
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=SHAPE.vocab_size, initializer_range=0.2, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    example = importlib.import_module("llama_to_diff")
    assert example.main(str(tmp_path / "llama"), str(tmp_path / "out"), text, steps=2) < 1e-4
    assert (tmp_path / "out/trained/model/config.json").exists()


def test_the_notebook_draws_the_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    # The kernel is a process of its own: it keeps its text in this folder, and compiles nothing there.
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    notebook = nbformat.read(EXAMPLES / "maps.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given = {"TEXT": write_text(tmp_path), "SHAPE": write_shape(tmp_path), "STEPS": 2, "OUT": str(tmp_path / "runs")}
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in (given | {"PROMPT": "the union"}).items())
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (drawn,) = notebook.cells[-2].outputs
    assert len(drawn.data["image/png"]) > 10_000


def test_a_loop_accelerate_and_the_trainer_train_a_sharded_model_as_one_rank_does(tmp_path: Path) -> None:
    ran = [run_ranks(sharded_examples.losses, count, str(EXAMPLES / "sharded"), str(tmp_path / str(count)))
           for count in (1, 2)]  # fmt: skip
    assert len(ran[0][0]) == 4
    for found in ran[1]:
        for name, expected in ran[0][0].items():
            assert found[name] == pytest.approx(expected, abs=1e-5), name
            assert len(set(expected)) == sharded_examples.STEPS
    for folder in ("loop", "trainer"):
        one, two = (DiffTransformerForCausalLM.from_pretrained(tmp_path / count / folder) for count in "12")
        for key, weight in one.named_parameters():
            # Three steps of Adam are each about as long as the learning rate, 1e-3, and where a gradient is nearly zero
            # its rounding decides the direction.
            assert (two.get_parameter(key) - weight).abs().mean() < 1e-5, key

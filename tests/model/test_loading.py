import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_folders import TOKENS, small_folder, small_tokenizer
from support.small_models import tokens
from transformers import LlamaConfig, LlamaForCausalLM

from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.loading import load, load_model
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.variants import VARIANTS

WEIGHTS = "model.safetensors"


def change_config(folder: Path, **fields) -> None:
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("attention", VARIANTS)
def test_our_models_load_as_they_were_saved(attention, tmp_path):
    model, tokenizer = load(small_folder(tmp_path, attention), device="cpu")
    assert isinstance(model, DiffTransformerForCausalLM)
    assert not model.training
    saved = DiffTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens(2, 9)).logits, saved(tokens(2, 9)).logits)
    assert tokenizer.decode(tokenizer("löwe 🦁")["input_ids"]) == "löwe 🦁"
    assert load_model(tmp_path, attn_implementation="eager", device="cpu").config._attn_implementation == "eager"


def test_other_architectures_and_split_checkpoints_load(tmp_path):
    config = LlamaConfig(vocab_size=TOKENS, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path, max_shard_size="20kB")
    small_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, _ = load(tmp_path, device="cpu")
    assert torch.equal(model(tokens(2, 9)).logits, llama(tokens(2, 9)).logits)


def mapped(model: torch.nn.Module) -> set[bool]:
    """Whether the weights lie in pages of the file's, as this process' map of its memory says."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(WEIGHTS):
            start, end = line.split()[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return {any(start <= p.data_ptr() < end for start, end in ranges) for p in model.parameters()}


def test_weights_are_mapped_from_the_file_and_not_copied(tmp_path):
    small_folder(tmp_path)
    assert mapped(load_model(tmp_path, device="cpu")) == {True}
    assert mapped(load_model(tmp_path, "float32", "cpu")) == {True}
    # The λ vectors stay float32 in a bfloat16 model.
    half = load_model(tmp_path, "bfloat16", "cpu")
    assert half.dtype == torch.bfloat16
    assert mapped(half) == {True, False}


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def a_run(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "config.json").rename(folder / "model" / "config.json")
    (folder / "config.json").write_text('{"steps": 300}')


def another_head_width(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(7, 61)


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, r"holds no config\.json"),
    "a run's folder": (a_run, CheckpointError, "is the folder of a run; wanted the folder of a model: take '.*/model'"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, r"holds no model\.safetensors"),
    "only a pickle": (only_a_pickle, CheckpointError, r"pytorch_model\.bin, a pickle, which .* is never loaded"),
    "cut weights": (cut, CheckpointError, "is damaged: it has"),
    "unknown model": (lambda f: change_config(f, model_type="new"), UnsupportedError, "'new' in .* is not known here"),
    "no model type": (lambda f: change_config(f, model_type=None), UnsupportedError, "model_type is None"),
    "a program": (
        lambda f: change_config(f, model_type="new", auto_map={"AutoConfig": "c.C"}),
        UnsupportedError,
        "brings its own program, which is never run",
    ),
    "a model that writes no text": (
        lambda f: change_config(f, model_type="vit"), UnsupportedError, "'vit' in .* which writes no text",
    ),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}'),
        UnsupportedError,
        "holds an adapter",
    ),
    "weights by another name": (
        lambda f: change_config(f, transformers_weights="adapter_model.bin"), UnsupportedError, "transformers_weights",
    ),
    "impossible heads": (lambda f: change_config(f, num_attention_heads=5), ConfigError, "num_attention_heads=5"),
    "a word for a number": (
        lambda f: change_config(f, hidden_size="wide"), (CheckpointError, ConfigError), "hidden_size",
    ),
    "another variant": (
        lambda f: change_config(f, attention="softmax", num_key_value_heads=4, head_dim=10),
        CheckpointError,
        r"hold model\.layers\.0\.self_attn\.lam\.lambda_k1 \(and \d+ more\), which the model of config",
    ),
    "more layers": (
        lambda f: change_config(f, num_hidden_layers=4),
        CheckpointError,
        r"lack model\.layers\.3\.input_layernorm\.weight \(and \d+ more\); wanted every tensor of the model",
    ),
    "another width": (
        lambda f: change_config(f, intermediate_size=66),
        CheckpointError,
        r"mlp\.down_proj\.weight is 61×67 there and 61×66 by config\.json \(and 8 more\)",
    ),
    "a tensor of another shape": (
        lambda f: change_weights(f, another_head_width),
        CheckpointError,
        r"layers\.1\.self_attn\.k_proj\.weight is 7×61",
    ),
    "a tensor less": (
        lambda f: change_weights(f, lambda tensors: tensors.pop("model.norm.weight")),
        CheckpointError,
        r"lack model\.norm\.weight;",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), CheckpointError, "holds no tokenizer"),
    "a broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": 3}'),
        CheckpointError,
        "tokenizer of .* cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_folder_that_is_not_exactly_its_model_is_refused_in_one_line(damage, error, message, tmp_path, monkeypatch):
    folder = small_folder(tmp_path / "model folder")
    load(folder, device="cpu")
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "harm-was-done").exists()


def test_code_that_a_folder_brings_is_not_run(tmp_path):
    folder = small_folder(tmp_path)
    model = DiffTransformerForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, remote_code=True)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    assert len(list(folder.glob("*.py"))) > 3
    assert type(load(folder, device="cpu")[0]) is DiffTransformerForCausalLM


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json' is a file; wanted the folder of a checkpoint"):
        load(small_folder(tmp_path) / "config.json")


def test_options_that_cannot_be_are_refused_in_one_line(tmp_path, monkeypatch):
    folder = small_folder(tmp_path)
    with pytest.raises(ConfigError, match="dtype='int3'; wanted one of auto, float32, bfloat16"):
        load(folder, dtype="int3")
    with pytest.raises(ConfigError, match="device='tpu'; wanted auto, cpu or cuda"):
        load(folder, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="torch sees no GPU here"):
        load(folder, device="cuda")
    with pytest.raises(UnsupportedError, match=r"cannot be loaded here \(.*flash_attention_9") as caught:
        load(folder, device="cpu", attn_implementation="flash_attention_9")
    assert "\n" not in str(caught.value)

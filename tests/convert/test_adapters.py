"""LoRA adapters of PEFT merged into their base: to the bit as PEFT does it; what cannot be merged is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_folders import logits, make_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from diffattn.convert.convert import convert
from diffattn.errors import CheckpointError, DiffattnError, UnsupportedError

QUERY = "base_model.model.model.layers.1.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"],
          "bias": "none", "modules_to_save": None, "use_rslora": False, "use_dora": False, "rank_pattern": {},
          "alpha_pattern": {}, "init_lora_weights": True, "fan_in_fan_out": False, "peft_version": "0.21.2",
          "megatron_core": "megatron.core", "inference_mode": True, "eva_config": None}  # fmt: skip


def adapter_folder(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter for one W_Q of 72 × 72, as PEFT writes it."""
    folder.mkdir()
    torch.manual_seed(3)
    save_file({f"{QUERY}.lora_A.weight": torch.randn(3, 72), f"{QUERY}.lora_B.weight": torch.randn(72, 3)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(base)} | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"r": 8, "rank_pattern": {"q_proj": 3}}, 2.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 12}}, 4.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 12}}, 2.0),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, 2.0),
    ],
)
def test_a_matrix_becomes_the_sum(changes: dict, scale: float, tmp_path: Path) -> None:
    base = make_folder("llama", tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter", **changes)
    done = convert(adapter, tmp_path / "made")
    assert (done.source, done.target) == ("qwen2", "softmax")
    assert done.notes[0].startswith(f"the adapter was merged into {str(base)!r}: one tensor changed")
    before, made = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "made"))
    parts = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    delta = (parts[f"{QUERY}.lora_B.weight"] @ parts[f"{QUERY}.lora_A.weight"]) * scale
    assert torch.equal(made.pop(name), before.pop(name) + delta)
    assert all(torch.equal(made[each], tensor) for each, tensor in before.items())
    # The base's tokenizer is taken along, or the adapter's where it has one.
    assert (tmp_path / "made/tokenizer.json").read_text() == '{"a":  1}'
    (adapter / "tokenizer.json").write_text("{}")
    convert(adapter, tmp_path / "again", "diff_v2")
    assert (tmp_path / "again/tokenizer.json").read_text() == "{}"


def test_the_base_is_not_changed_and_a_relative_path_is_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_folder("llama", tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    convert(adapter_folder(Path("base"), tmp_path / "adapter"), tmp_path / "made")
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax", "dex"])
def test_a_model_of_ours_stays_what_it_is(kind: str, tmp_path: Path) -> None:
    base = make_folder(kind, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    weights = load_file(base / "model.safetensors")
    name = "model.layers.2.mlp.down_proj"
    saved = {f"base_model.model.{key}": tensor + 1 for key, tensor in weights.items() if ".2.self_attn.lam." in key}
    out, into = weights[f"{name}.weight"].shape
    (tmp_path / "adapter").mkdir()
    parts = {f"base_model.model.{name}.lora_A.weight": torch.ones(3, into),
             f"base_model.model.{name}.lora_B.weight": torch.ones(out, 3)}  # fmt: skip
    save_file(parts | saved, tmp_path / "adapter/adapter_model.safetensors")
    settings = CONFIG | {"base_model_name_or_path": str(base), "modules_to_save": ["lam"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    done = convert(tmp_path / "adapter", tmp_path / "made")
    assert (done.source, done.target, done.same_function) == (kind, kind, True)
    made = load_file(tmp_path / "made/model.safetensors")
    assert torch.equal(made[f"{name}.weight"], weights[f"{name}.weight"] + 6)
    assert all(torch.equal(made[key.removeprefix("base_model.model.")], tensor) for key, tensor in saved.items())
    # V2's matrix is a module lambda_proj, which is not the module lam.
    assert len(saved) == (4 if kind == "diff_v1" else 0)
    assert json.loads((tmp_path / "made/config.json").read_text())["attention"] == config["attention"]
    assert (logits(tmp_path / "made") - logits(base)).abs().max() > 1e-2


def other(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {name: value}))

    return change


def one_more(name: str, tensor: Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file) | {name: tensor}, file)

    return change


def half_gone(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[f"{QUERY}.lora_B.weight"]
    save_file(weights, file)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], None], type[DiffattnError], str]] = {
    "DoRA": (other("use_dora", True), UnsupportedError, "use_dora of adapter_config.json is True; wanted plain LoRA"),
    "another tuner": (other("peft_type", "IA3"), UnsupportedError, "peft_type of adapter_config.json is 'IA3'"),
    "PiSSA": (other("init_lora_weights", "pissa"), UnsupportedError, "init_lora_weights .* is 'pissa'"),
    "biases": (other("bias", "lora_only"), UnsupportedError, "bias of adapter_config.json is 'lora_only'"),
    "a bias of B": (other("lora_bias", True), UnsupportedError, "lora_bias .* is True"),
    "tokens": (other("trainable_token_indices", [3]), UnsupportedError, "trainable_token_indices .* is \\[3\\]"),
    "a field of the future": (other("use_what", 1), UnsupportedError, "use_what of adapter_config.json is 1"),
    "a base elsewhere": (other("base_model_name_or_path", "someone/model"), UnsupportedError, "'someone/model', which"),
    "no base": (other("base_model_name_or_path", None), UnsupportedError, "is None, which is no folder here"),
    "a rank that cannot be": (other("r", 0), CheckpointError, "has r 0 and lora_alpha 6"),
    "another rank": (other("r", 4), CheckpointError, "lora_A of .* is 3×72; wanted 4×72"),
    "half an adapter": (half_gone, CheckpointError, "lacks a matrix A or B: .*q_proj"),
    "cut off": (cut, CheckpointError, "is damaged"),
    "a pickle": (as_pickle, CheckpointError, "holds no adapter_model.safetensors; wanted the adapter's weights in"),
    "an embedding": (one_more("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(3, 71)),
                     UnsupportedError, "holds .*lora_embedding_A; wanted matrices A and B"),
    "a layer too many": (one_more(QUERY.replace("1", "7") + ".lora_B.weight", torch.ones(72, 3)), CheckpointError,
                         "lacks a matrix A or B: model.layers.7"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_line_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    adapter = adapter_folder(make_folder("llama", tmp_path / "base"), tmp_path / "adapter")
    change, error, words = REFUSED[name]
    change(adapter)
    with pytest.raises(error, match=words) as caught:
        convert(adapter, tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_an_embedding_of_its_own_for_a_tied_base_is_refused(tmp_path: Path) -> None:
    base = make_folder("softmax", tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file({"base_model.model.lm_head.weight": head}, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="whose two embeddings are one matrix"):
        convert(adapter, tmp_path / "made")


LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "modules": {"target_modules": ["k_proj"], "modules_to_save": ["norm", "lm_head"]},
}


def base_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 71, "hidden_size": 48, "intermediate_size": 67, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    if name == "phi3":
        return Phi3ForCausalLM(Phi3Config(**sizes))
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [*LORA, "phi3"])
@pytest.mark.filterwarnings("ignore")
def test_merging_is_what_peft_does_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base_model(name).to(dtype).save_pretrained(tmp_path / "base")
    fields = LORA.get(name, {"target_modules": ["qkv_proj", "gate_up_proj"]})
    load = {"dtype": dtype}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load),
        peft.LoraConfig(r=4, lora_alpha=7, lora_dropout=0.1, task_type="CAUSAL_LM", **fields),
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **load), tmp_path / "adapter"
    )
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "expected")
    convert(tmp_path / "adapter", tmp_path / "made")
    expected, made = (load_file(tmp_path / each / "model.safetensors") for each in ("expected", "made"))
    assert expected.keys() == made.keys()
    for key, tensor in expected.items():
        assert made[key].dtype == tensor.dtype == dtype
        assert torch.equal(made[key], tensor), key
    base = tmp_path / "unchanged"
    convert(tmp_path / "base", base)
    before = load_file(base / "model.safetensors")
    assert sum(not torch.equal(before[key], tensor) for key, tensor in made.items()) >= 3
    shutil.rmtree(tmp_path / "base")

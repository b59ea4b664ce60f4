"""GGUF files converted as transformers reads them; what it would drop without a word is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from diffattn.convert.convert import convert
from diffattn.errors import CheckpointError, ConfigError, DiffattnError, UnsupportedError

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}  # fmt: skip
NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
         "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
         "down_proj": "ffn_down", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}  # fmt: skip


def test_without_the_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(
            ConfigError, match="gguf is not installed; wanted gguf, which reads it: pip install 'diffattn"
        ):
            convert(source, tmp_path / "made")


def test_one_of_several_files_has_to_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        CheckpointError, match=r"holds 2 GGUF files; wanted one model: name a file, such as '.*a\.gguf'"
    ):
        convert(tmp_path, tmp_path / "made")


def turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of W_Q or W_K in the order of the format, whose rotary positions turn neighbouring channels."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def small(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = SIZES | {"initializer_range": 0.15, "rms_norm_eps": 1e-6}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**fields)).eval()
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**fields))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()
    # The width that the class has where the file does not say it, which is not that of the hidden size.
    return Qwen3ForCausalLM(Qwen3Config(**fields, head_dim=128)).eval()


def write_gguf(
    file: Path,
    *,
    architecture: str = "llama",
    kind: str = "F16",
    facts: dict[str, Any] | None = None,
    extra: tuple = (),
) -> None:
    """Write a small random model as a GGUF file."""
    import gguf

    model = small(architecture)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    writer.add_context_length(40)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    if architecture == "llama":
        writer.add_rope_dimension_count(16)
    if architecture == "qwen3":
        writer.add_key_length(128)
        writer.add_value_length(128)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    for name, value in (facts or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    for name, tensor in model.state_dict().items():
        short = TOP.get(name)
        if short is None:
            _, _, layer, *rest = name.split(".")
            short = f"blk.{layer}.{NAMES[rest[-2]]}.{rest[-1]}"
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = turned(tensor, 4 if "q_proj" in name else 2)
        values = tensor.float().numpy()
        chosen = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        writer.add_tensor(short, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    for name in extra:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "kind", "named"),
    [
        ("llama", "F32", "file"),
        ("llama", "F16", "folder"),
        ("llama", "BF16", "folder"),
        ("llama", "Q8_0", "file"),
        ("qwen2", "F32", "folder"),
        ("qwen3", "F32", "file"),
    ],
)
def test_a_file_is_converted_as_transformers_reads_it(
    architecture: str, kind: str, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    source = tmp_path / "source"
    source.mkdir()
    write_gguf(source / "small.gguf", architecture=architecture, kind=kind)
    done = convert(source if named == "folder" else source / "small.gguf", tmp_path / "made")
    assert "quantizing" not in capfd.readouterr().err
    assert (done.source, done.target, done.dtype) == (architecture, "softmax", "float32")
    assert kind in done.notes[0]
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file="small.gguf", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    ids = torch.randint(0, 64, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        far = (small(architecture)(ids).logits - actual).abs().max()
    assert far < {"F32": 1e-5, "F16": 0.01, "BF16": 0.1, "Q8_0": 0.2}[kind]
    assert (json.loads((tmp_path / "made/config.json").read_text())["converted"]["from"]) == architecture


REFUSED: dict[str, tuple[dict[str, Any], type[DiffattnError], str]] = {
    "long texts": ({"facts": {"llama.rope.scaling.type": "linear"}}, UnsupportedError, "rope.scaling.type = 'linear'"),
    "a factor": ({"facts": {"llama.rope.scaling.factor": 4.0}}, UnsupportedError, "rope.scaling.factor = 4.0, which"),
    "experts": ({"facts": {"llama.expert_count": 8}}, UnsupportedError, "expert_count = 8"),
    "a window": ({"facts": {"llama.attention.sliding_window": 8}}, UnsupportedError, "attention.sliding_window = 8"),
    "other widths": ({"facts": {"llama.attention.key_length": 8}}, UnsupportedError, "key_length = 8.*; wanted 16"),
    "factors of positions": ({"extra": ("rope_freqs.weight",)}, UnsupportedError, "holds 22 tensors, of which"),
    "parts": ({"facts": {"split.count": 3}}, CheckpointError, "is one of 3 parts"),
}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_would_drop_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    changes, error, words = REFUSED[name]
    write_gguf(tmp_path / "small.gguf", **changes)
    with pytest.raises(error, match=words) as caught:
        convert(tmp_path, tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["cut", "empty", "another architecture"])
def test_a_file_that_cannot_be_read_is_one_line(damage: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "small.gguf"
    if damage == "another architecture":
        writer = gguf.GGUFWriter(file, "gemma2")
        writer.add_vocab_size(64)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    else:
        write_gguf(file)
        file.write_bytes(file.read_bytes()[:-5000] if damage == "cut" else b"")
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        convert(file, tmp_path / "made")
    assert "\n" not in str(caught.value)
    if damage == "another architecture":
        assert "norms behind attention" in str(caught.value)

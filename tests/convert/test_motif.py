"""Motif made ours and back: by the logits of a plain float64 loop over its own tensors, and bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_folders import SAYS_MOTIF, logits
from support.motif_loop import MOTIF, motif_logits, motif_tensors
from support.small_models import small_model, tokens
from torch import Tensor

from diffattn.cli.main import main
from diffattn.convert import motif
from diffattn.convert.convert import convert, kind_of
from diffattn.convert.diffllama import to_diffllama
from diffattn.convert.layout import halves_to_pairs
from diffattn.convert.motif import from_motif, to_motif
from diffattn.convert.unilm import to_reference
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig, lambda_init_schedule
from diffattn.model.modeling import DiffTransformerForCausalLM

IDS = tokens(2, 17)
EVERY = pytest.mark.parametrize("name", MOTIF)


def built(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> DiffTransformerForCausalLM:
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_dict(json.loads(json.dumps(config)))).to(dtype)
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


@torch.no_grad()
@EVERY
@pytest.mark.parametrize("implementation", ["diff_fused", "sdpa"])
def test_logits_are_those_of_the_published_layout(name: str, implementation: str) -> None:
    weights = motif_tensors(MOTIF[name])
    expected = motif_logits(MOTIF[name], weights, IDS)
    assert expected.std() > 1
    model = built(*from_motif(MOTIF[name], weights), torch.float64)
    model.set_attn_implementation(implementation)
    assert (model(IDS).logits - expected).abs().max() < 1e-9


@torch.no_grad()
@EVERY
def test_logits_are_the_same_with_a_cache(name: str) -> None:
    weights = motif_tensors(MOTIF[name])
    expected = motif_logits(MOTIF[name], weights, IDS)
    model = built(*from_motif(MOTIF[name], weights), torch.float64)
    start = model(IDS[:, :9], use_cache=True)
    parts, cache = [start.logits], start.past_key_values
    for at in (slice(9, 10), slice(10, 14), slice(14, 17)):
        parts.append(model(IDS[:, at], past_key_values=cache).logits)
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", ["Motif-2.6B", "Motif-2-12.7B"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generate_writes_what_the_loop_writes(name: str, cache: str | None) -> None:
    weights = motif_tensors(MOTIF[name])
    written = IDS[:1, :5]
    for _ in range(6):
        following = motif_logits(MOTIF[name], weights, written)[:, -1].argmax(-1, keepdim=True)
        written = torch.cat((written, following), dim=1)
    model = built(*from_motif(MOTIF[name], weights), torch.float64)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    answer = model.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
    assert answer.tolist() == written.tolist()
    assert len(set(written[0, 5:].tolist())) > 2


def motif_folder(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A folder as it is published, with a program of its own that says so if it is ever run."""
    folder.mkdir()
    config = MOTIF[name] | {"torch_dtype": str(dtype).removeprefix("torch.")} | fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_motif.py").write_text("open('ran', 'w')\n")
    save_file(motif_tensors(MOTIF[name], dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_published_folder_there_and_back_keeps_every_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = motif_folder(name, tmp_path / "source", dtype=dtype)
    result = convert(source, tmp_path / "ours")
    assert result.target == ("diff_gda" if "12.7B" in name else "diff_v1")
    assert any("was not run" in note for note in result.notes)
    assert logits(tmp_path / "ours").dtype == dtype
    back = convert(tmp_path / "ours", tmp_path / "back", "motif")
    assert back.target == "motif"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    computed = {"head_dim": configs[0]["hidden_size"] // configs[0]["num_attention_heads"]}
    unread = {"auto_map", "attention_dropout", "sliding_window", "use_sliding_window"}
    assert configs[1] == computed | {key: value for key, value in configs[0].items() if key not in unread}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "source"]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["diff_v1", "diff_gda"])
def test_our_model_in_the_published_layout_is_what_the_loop_computes(attention: str) -> None:
    model = expressible(attention)
    config = json.loads(json.dumps(model.config.to_diff_dict()))
    made, weights = to_motif(config, dict(model.state_dict()))
    expected = motif_logits(json.loads(json.dumps(made)), weights, IDS)
    assert expected.std() > 0.5
    assert (model.double()(IDS).logits - expected).abs().max() < 1e-9
    back, again = from_motif(json.loads(json.dumps(made)), weights)
    before = {name: tensor for name, tensor in model.float().state_dict().items() if name in again}
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert back | {"converted": None, "architectures": None} == config | {
        "converted": None, "architectures": None, "dtype": "float32"
    }  # fmt: skip


def expressible(attention: str, **fields: Any) -> DiffTransformerForCausalLM:
    """A small model of ours that Motif can say: heads that fill the hidden size, its λ_init, its activation."""
    return small_model(attention, **SAYS_MOTIF | fields)


WRONG: dict[str, Any] = {
    "motif_lambda_init": lambda layers: [lambda_init_schedule(layer) for layer in range(layers)],
    "DiffTransformerConfig": lambda **fields: DiffTransformerConfig(**fields | {"subln_eps": fields["rms_norm_eps"]}),
}


@pytest.mark.parametrize("name", ["Motif-2.6B biases", "Motif-2-12.7B"])
@torch.no_grad()
def test_a_wrong_conversion_shows_in_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = motif_tensors(MOTIF[name])
    expected = motif_logits(MOTIF[name], weights, IDS)
    for part in ("motif_lambda_init", "DiffTransformerConfig"):
        with monkeypatch.context() as patch:
            patch.setattr(motif, part, WRONG[part])
            model = built(*from_motif(MOTIF[name], weights), torch.float64)
        assert (model(IDS).logits - expected).abs().max() > 1e-7
    # Pairs by halves, as diffllama has them.
    width = 6 if name == "Motif-2.6B biases" else 10
    mixed = {key: halves_to_pairs(part, width) if ".q_proj." in key else part for key, part in weights.items()}
    model = built(*from_motif(MOTIF[name], mixed), torch.float64)
    assert (model(IDS).logits - expected).abs().max() > 1e-2


TWO, TWELVE = MOTIF["Motif-2.6B"], MOTIF["Motif-2-12.7B"]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (TWO | {"num_attention_heads": 7, "head_dim": None}, ConfigError, "num_attention_heads is 7; wanted an even"),
        (TWO | {"num_key_value_heads": 3}, ConfigError, "num_key_value_heads is 3; wanted an even"),
        (TWO | {"num_key_value_heads": 6}, ConfigError, "num_key_value_heads is 6 with 4 noise heads"),
        (TWO | {"head_dim": 10}, ConfigError, "head_dim is 10 and num_attention_heads 8, together 80 channels"),
        (TWO | {"hidden_size": 49, "head_dim": None}, ConfigError, "and there is no head_dim"),
        (TWO | {"hidden_size": "48"}, ConfigError, "hidden_size"),
        (TWO | {"rms_norm_eps": float("nan")}, ConfigError, "rms_norm_eps"),
        (TWO | {"attn_rms_norm_eps": 0.0}, ConfigError, "subln_eps|attn_rms_norm_eps"),
        (
            {key: value for key, value in TWO.items() if key != "attn_rms_norm_eps"},
            ConfigError,
            "lacks attn_rms_norm_eps",
        ),
        (TWO | {"use_bias": True, "qkv_bias": False}, ConfigError, "use_bias is True and qkv_bias False"),
        (TWO | {"use_bias": "yes"}, ConfigError, "use_bias is 'yes'"),
        (TWO | {"rope_parameters": {"rope_theta": 7.0}}, ConfigError, "rope_theta is 500.0, and 7.0"),
        (TWO | {"rope_scaling": {"rope_type": "new", "factor": 2.0}}, ConfigError, "rope_type is 'new'"),
        (TWO | {"hidden_act": "silu"}, UnsupportedError, "hidden_act is 'silu'; wanted 'poly_norm'"),
        (TWO | {"use_sliding_window": True}, UnsupportedError, "use_sliding_window is True"),
        (TWO | {"scale_emb": 12}, UnsupportedError, "has scale_emb 12, which is unknown here"),
        (TWO | {"moe": True}, UnsupportedError, "has moe True, which is unknown here"),
        (TWO | {"use_bias": True}, CheckpointError, r"lack model\.layers\.0\.mlp\.down_proj\.bias"),
        (TWO | {"num_hidden_layers": 4}, CheckpointError, r"lack model\.layers\.3"),
        (TWELVE | {"num_noise_heads": 0}, ConfigError, "num_noise_heads=0"),
        (TWELVE | {"num_noise_heads": 10}, ConfigError, "num_attention_heads is 10 with num_noise_heads 10"),
        (TWELVE | {"num_noise_heads": 4}, ConfigError, "wanted as many signal heads for each noise head"),
        (TWELVE | {"num_noise_heads": 1}, ConfigError, "num_key_value_heads is 4 with 1 noise heads"),
        (TWELVE | {"k_ratio": 2}, UnsupportedError, "k_ratio is 2; wanted 1"),
        (
            TWELVE | {"num_noise_heads": None, "num_key_value_heads": 2},
            ConfigError,
            "head_dim is 10 and num_attention_heads 10",
        ),
    ],
)
def test_fields_that_cannot_be_or_contradict_each_other_are_one_line(
    config: dict[str, Any], error: type, words: str
) -> None:
    name = "Motif-2-12.7B" if "num_noise_heads" in config else "Motif-2.6B"
    with pytest.raises(error, match=words) as caught:
        from_motif(config, motif_tensors(MOTIF[name]))
    assert "\n" not in str(caught.value)


def test_fields_that_ask_for_nothing_are_let_pass() -> None:
    nothing = {"scale_emb": 1, "moe": False, "multi_token_heads": None, "logit_softcap": 0.0, "expanded": True}
    weights = motif_tensors(TWO)
    assert from_motif(TWO | nothing, weights)[0] == from_motif(TWO, weights)[0]


@pytest.mark.parametrize(
    ("attention", "fields", "words"),
    [
        ("diff_v2", {"lambda_init": None}, "attention is 'diff_v2'; wanted diff_v1 or diff_gda"),
        ("diff_v1", {"lambda_init": None}, "λ_init of the first layer is 0.2; wanted −0.0099"),
        ("diff_v1", {"lambda_init": 0.8}, "λ_init of the first layer is 0.8"),
        ("diff_v1", {"hidden_act": "silu"}, "hidden_act is 'silu'; wanted poly_norm"),
        ("diff_v1", {"subln_affine": False}, "subln_affine is False"),
        ("diff_v1", {"head_norm": False}, "'head_norm': False"),
        ("diff_v1", {"qk_norm": True}, "qk_norm is True"),
        ("diff_v1", {"sliding_window": 5}, "sliding_window is 5"),
        ("diff_gda", {"unrotated_layers": [1]}, "unrotated_layers is"),
        ("diff_v1", {"attention_output_bias": True}, "attention_output_bias True"),
        ("diff_v1", {"hidden_size": 61}, "are 120 channels, hidden_size is 61"),
    ],
)
def test_what_motif_cannot_say_is_refused(attention: str, fields: dict[str, Any], words: str) -> None:
    model = expressible(attention, **fields)
    with pytest.raises(UnsupportedError, match=words) as caught:
        to_motif(json.loads(json.dumps(model.config.to_diff_dict())), dict(model.state_dict()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", [to_motif, to_diffllama, to_reference])
def test_an_encoder_is_refused(to: Any) -> None:
    plain = {} if to is to_motif else {"hidden_act": "silu", "lambda_init": None}
    model = expressible("diff_v1", **plain)
    config = json.loads(json.dumps(model.config.to_diff_dict())) | {"is_causal": False}
    with pytest.raises(UnsupportedError, match="is_causal is False"):
        to(config, dict(model.state_dict()))


def test_the_layout_is_told_by_the_noise_heads() -> None:
    assert kind_of(TWO) == "motif V1"
    assert kind_of(TWO | {"model_type": "motif"}) == "motif V1"
    assert kind_of(TWELVE) == "motif GDA"


def test_the_command_line_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = motif_folder("Motif-2.6B", tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("motif V1 → diff_v1: the names of λ")
    assert lines[0].endswith("every weight is kept bit for bit")
    assert main(["convert", str(source), str(tmp_path / "gda"), "--to", "diff_gda"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1

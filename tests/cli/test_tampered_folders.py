"""A folder that someone changed: one line that says what is wrong, before anything is built, or the model still."""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serve.small_folders import small_folder

from diffattn.cli.main import main
from diffattn.config_fields import FIELDS
from diffattn.errors import DiffattnError
from diffattn.model.loading import load

Damage = Callable[[Path], None]
WEIGHTS = "model.safetensors"
NAN, INF = float("nan"), float("inf")
ONE = "model.layers.1.mlp.up_proj.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in whole.iterdir():
        os.link(file, copy / file.name)
    return copy


def write(folder: Path, name: str, content: bytes) -> None:
    # Not through the hard link.
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def fields(name: str = "config.json", **changed: Any) -> Damage:
    def damage(folder: Path) -> None:
        write(folder, name, json.dumps(json.loads((folder / name).read_bytes()) | changed).encode())

    return damage


def file(name: str, content: bytes) -> Damage:
    return lambda folder: write(folder, name, content)


def half(name: str) -> Damage:
    return lambda folder: write(folder, name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        (folder / WEIGHTS).unlink()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def one(make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return weights(lambda tensors: tensors.update({ONE: make(tensors[ONE])}))


def number(value: float) -> Damage:
    return weights(lambda tensors: tensors[ONE][3, 5:6].fill_(value))


def header(text: bytes, rest: bytes = b"") -> Damage:
    return file(WEIGHTS, struct.pack("<Q", len(text)) + text + rest)


def index(weight_map: object) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        write(folder, "model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())

    return damage


# Each with what the line says.
REFUSED: dict[str, tuple[Damage, str]] = {}
for _name, _value, _says in (
    *((name, value, f"{name}={value!r} given; a finite number above 0") for name in ("rms_norm_eps", "subln_eps")
      for value in (NAN, INF, -1, 0, 1e12, "1e-5", True, None, [])),
    *((name, value, f"{name}={value!r} given; a positive integer is wanted")
      for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                   "num_key_value_heads", "head_dim", "max_position_embeddings")
      for value in (0, -1, 10**12, "12", 4.0, True, [])),
    *((name, None, f"{name}=None given") for name in ("vocab_size", "hidden_size", "num_hidden_layers")),
    *((name, value, f"{name}={value!r} given; a finite number from 0") for name in ("initializer_range", "lambda_std")
      for value in (NAN, -0.1, 1e300, "x")),
    *((name, value, f"{name}={value!r} given; true or false is wanted")
      for name in ("use_cache", "tie_word_embeddings", "subln_affine", "pairs_share_group", "attention_bias",
                   "attention_output_bias", "mlp_bias", "qk_norm") for value in ("yes", 1, None)),
    *((name, value, f"{name}=") for name in ("pad_token_id", "bos_token_id", "eos_token_id")
      for value in (-1, "0", 1.5, True)),
    *((name, 300, f"{name} is 300; ids from 0 to 299 are wanted") for name in ("pad_token_id", "bos_token_id")),
    ("eos_token_id", [0, 10**12], "eos_token_id is [0, 1000000000000]"), ("eos_token_id", [0, None], "eos_token_id="),
    *(("rope_theta", value, "rope_theta=") for value in (0, -1, NAN, "1e4")),
    *(("rope_parameters", value, "rope_parameters=") for value in (5, "default", [])),
    *(("rope_parameters", value, says) for value, says in (
        ({"rope_theta": 0}, "rope_theta of rope_parameters=0"), ({"rope_type": "foo"}, "rope_type is 'foo'"),
        ({"rope_type": ["yarn"]}, "rope_type is ['yarn']"), ({"rope_type": "linear"}, "lack factor"),
        ({"rope_type": "linear", "factor": NAN}, "factor of rope_parameters=nan"),
        ({"rope_type": "dynamic", "factor": 0}, "factor of rope_parameters=0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (YARN | {"factor": "2"}, "factor of rope_parameters='2'"), (YARN | {"beta_fast": INF}, "beta_fast of"),
        (YARN | {"mscale": NAN}, "mscale of"), (YARN | {"attention_factor": -1}, "attention_factor of"),
        (LONG | {"short_factor": [1.0, NAN, 1.0, 1.0, 1.0]}, "short_factor of"),
        (LONG | {"long_factor": [1.0]}, "long_factor of rope_parameters has 1 numbers; 5 are wanted"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor of rope_parameters is 1.0"),
        (LLAMA3 | {"low_freq_factor": None}, "low_freq_factor of"),
        ({"rope_type": "llama3", "factor": 4.0}, "lack low_freq_factor"))),
    *(("hidden_act", value, "hidden_act") for value in ("x", 5, None, ["silu"])),
    *(("dtype", value, f"dtype={value!r} given; one of float32, ") for value in (0, "float7", "int8", [], True)),
    *(("attention", value, "attention=") for value in ("diff", None, 1, ["diff_v1"])),
    *(("lambda_init", value, "lambda_init=") for value in (NAN, 1, -0.1, "0.8", True)),
    ("lambda_form", "tanh", "lambda_form='tanh'"), ("head_norm", "no", "head_norm='no'"),
    ("dex_heads", [[0], 1], "dex_heads="), ("dex_heads", [[0], [0], [0]], "wanted attention 'dex'"),
    ("sliding_window", 4, "leave it out, since no model of ours has it"), ("num_labels", 10**12, "num_labels="),
    ("layer_types", ["full_attention"], "layer_types="), ("is_encoder_decoder", True, "is_encoder_decoder="),
    ("num_attention_heads", 7, "num_attention_heads is 7"),
    ("num_hidden_layers", 400_000, "num_hidden_layers is 400,000 and the weights are 44 tensors"),
    ("num_hidden_layers", 40, "lack model.layers.10.input_layernorm.weight (and 517 more)"),
    ("vocab_size", 299, "model.embed_tokens.weight is 300×61 there and 299×61 by config.json"),
    *(("quantization_config", value, "has a quantization_config") for value in ("x", {"quant_method": 5})),
    ("model_type", ["diff_transformer"], "model_type is ['diff_transformer']"), ("model_type", 5, "model_type is 5"),
    ("id2label", {"x": 1}, "describes no model"), ("per_layer_config", [1], "per_layer_config="),
):  # fmt: skip
    REFUSED[f"{_name} {_value}"[:60]] = (fields(**{_name: _value}), _says)
_DEEP, _LONG = b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"
for _file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
    REFUSED |= {
        f"{_file} {what}": (file(_file, content), _file.partition(".")[0].partition("_")[0])
        for what, content in {"empty": b"", "garbled": b"\x00\xff{]", "deep": _DEEP, "a list": b"[]", "null": b"null",
                              "a number": b"5", "a long number": _LONG}.items()
    }  # fmt: skip
    REFUSED[f"{_file} cut"] = (half(_file), _file.partition(".")[0].partition("_")[0])
REFUSED |= {
    "no config.json": (gone("config.json"), "holds no config.json"),
    "no tokenizer.json": (gone("tokenizer.json"), "holds no tokenizer"),
    "no weights": (gone(WEIGHTS), "holds no model.safetensors"),
    "special_tokens_map.json": (file("special_tokens_map.json", b"["), "special_tokens_map.json"),
    "added_tokens.json": (file("added_tokens.json", b"[]"), "added_tokens.json"),
    "an adapter": (file("adapter_config.json", b""), "holds an adapter"),
    **{
        f"generation {name} {value}"[:60]: (fields("generation_config.json", **{name: value}), f"{name}")
        for name, value in (("temperature", NAN), ("temperature", "hot"), ("top_p", 2), ("top_k", -1), ("top_k", "5"),
                            ("eos_token_id", 300), ("eos_token_id", [0, 10**12]), ("eos_token_id", []),
                            ("eos_token_id", "0"), ("pad_token_id", -1), ("max_length", "x"), ("do_sample", "yes"))
    },
    **{
        f"tokenizer {name} {value}"[:60]: (fields("tokenizer_config.json", **{name: value}), "tokenizer")
        for name, value in (("model_max_length", "x"), ("model_max_length", []), ("eos_token", 5), ("eos_token", {}),
                            ("padding_side", "middle"), ("added_tokens_decoder", 5), ("added_tokens_decoder", {"x": 1}),
                            ("tokenizer_class", 5), ("chat_template", ["x"]), ("extra_special_tokens", 5))
    },
    **{
        f"tokenizer.json {name} {value}"[:60]: (fields("tokenizer.json", **{name: value}), "tokenizer")
        for name, value in (("model", {}), ("model", None), ("added_tokens", {}), ("pre_tokenizer", {"type": "x"}),
                            ("decoder", 5), ("truncation", {"max_length": -1}))
    },
    "a token of no row": (
        fields("tokenizer_config.json", extra_special_tokens=[f"<{i}>" for i in range(300)]),
        "and the model knows 300; the model's own tokenizer is wanted",
    ),
    "weights NaN": (number(NAN), f"holds a NaN or an infinity in {ONE}"),
    "weights Inf": (number(INF), f"holds a NaN or an infinity in {ONE}"),
    "weights −Inf in half": (one(lambda w: w.half().index_fill(0, torch.tensor([66]), -INF)), "NaN or an infinity"),
    "weights NaN in bfloat16": (one(lambda w: w.bfloat16().fill_(NAN)), "NaN or an infinity"),
    "weights too large": (weights(lambda tensors: [each.fill_(3e38) for each in tensors.values()]), "logits are no"),
    "weights renamed": (weights(lambda tensors: tensors.update({"model.x": tensors.pop(ONE)})), f"lack {ONE}"),
    "weights missing": (weights(lambda tensors: tensors.pop(ONE)), f"lack {ONE}"),
    "weights extra": (weights(lambda tensors: tensors.update({"a\nb": torch.ones(3)})), "hold 'a\\nb', for which"),
    "weights transposed": (one(lambda w: w.T.contiguous()), f"{ONE} is 61×67 there and 67×61 by config.json"),
    "weights of size 0": (one(lambda w: w[:0]), f"{ONE} is 0×61 there"),
    "weights int8": (one(lambda w: w.to(torch.int8)), "is I8; floating-point weights of at least 16 bits"),
    "weights bool": (one(lambda w: w > 0), "is BOOL; floating-point weights"),
    "weights float8": (one(lambda w: w.to(torch.float8_e4m3fn)), "is F8_E4M3; floating-point weights"),
    "weights complex": (one(lambda w: w.to(torch.complex64)), "is C64; floating-point weights"),
    "no tensor": (weights(lambda tensors: tensors.clear()), "num_hidden_layers is 3 and the weights are 0 tensors"),
    "weights empty": (file(WEIGHTS, b""), "is damaged"),
    "weights cut": (half(WEIGHTS), "is damaged"),
    "header deep": (header(_DEEP), "its header is no JSON object"),
    "header of long numbers": (
        header(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,%b]}}' % (b"9" * 4300, b"9" * 4300)), "cannot be",
    ),
    "header of fractions": (
        header(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0.0,4.0]}}', b"1234"), "cannot be",
    ),
    "header below 0": (header(b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', b"1234"), "cannot be"),
    **{
        f"index {value!r}"[:60]: (index(value), says)
        for value, says in (
            (["a"], "has no weight_map"), ({}, "has no weight_map"), ({"a": 5}, "names the file 5"),
            ({"a": {}}, "names the file {}"), ({"a": "../x.safetensors"}, "names the file '../x.safetensors'"),
            ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"), ({"a": "a\0b"}, "names the file 'a\\x00b'"),
            ({"a": "a" * 5000}, "names the file 'aaa"), ({"a": "\ud800"}, "names the file '\\ud800'"),
            ({"a": "a\nb"}, "names the file 'a\\nb'"), ({"a": "other.safetensors"}, "which is not there"),
            ({"a\nb": "part.safetensors"}, "says that part.safetensors holds 'a\\nb', which it does not"))
    },
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_is_one_line_from_the_command_and_from_python(
    damage: Damage, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    capsys.readouterr()
    began = time.perf_counter()
    assert main(["generate", str(folder), "low", "--max-new-tokens", "2", "--device", "cpu"]) == 2
    assert time.perf_counter() - began < 10
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diffattn: ")
    assert err.count("\n") == 1
    assert says in err
    assert len(err) < 900
    if "logits" in says:
        return
    with pytest.raises(DiffattnError) as caught:
        load(folder, device="cpu")
    assert str(caught.value) == err.removeprefix("diffattn: ").removesuffix("\n")


HARMLESS: dict[str, Damage] = {
    "no generation_config.json": gone("generation_config.json"),
    "no tokenizer_config.json": gone("tokenizer_config.json"),
    "rope_parameters null": fields(rope_parameters=None),
    **{f"rope {rope['rope_type']}": fields(rope_parameters=rope) for rope in (LLAMA3, YARN, LONG)},
    "dtype null": fields(dtype=None),
    "no token ids": fields(pad_token_id=None, bos_token_id=None, eos_token_id=None),
    "a field of tomorrow": fields(tomorrow={"a": [NAN]}),
    "one tensor in float16": one(lambda w: w.half()),
    "a key mark in UTF-8": lambda folder: write(
        folder, "generation_config.json", b"\xef\xbb\xbf" + (folder / "generation_config.json").read_bytes()
    ),
    "an index beside the weights": file("model.safetensors.index.json", b"["),
}


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=list(HARMLESS))
def test_what_changes_nothing_loads_and_answers_in_numbers(damage: Damage, folder: Path) -> None:
    damage(folder)
    model, tokenizer = load(folder, device="cpu")
    assert model(torch.tensor([tokenizer("low lower")["input_ids"]])).logits.isfinite().all()


def test_every_field_of_our_configuration_is_in_the_table(whole: Path) -> None:
    from dataclasses import fields as of_class

    from transformers import PreTrainedConfig

    from diffattn.model.configuration import DiffTransformerConfig

    theirs = {field.name for field in of_class(PreTrainedConfig)}
    assert {field.name for field in of_class(DiffTransformerConfig)} - theirs <= FIELDS.keys()

"""A folder that someone changed: one line that says what is wrong, before anything is built, or the model still."""

import dataclasses
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_folders import small_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from diffattn.cli.main import main
from diffattn.config_fields import FIELDS
from diffattn.errors import DiffattnError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.loading import load
from diffattn.model.modeling import DiffTransformerForCausalLM

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
    *((name, value, f"{name}={value!r}; wanted a finite number above 0") for name in ("rms_norm_eps", "subln_eps")
      for value in (NAN, INF, -1, 0, 1e12, "1e-5", True, None, [])),
    *((name, value, f"{name}={value!r}; wanted a{'n integer of at most' if value == 10**12 else ' positive integer'}")
      for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                   "num_key_value_heads", "head_dim", "max_position_embeddings")
      for value in (0, -1, 10**12, "12", 4.0, True, [])),
    *((name, None, f"{name}=None") for name in ("vocab_size", "hidden_size", "num_hidden_layers")),
    *((name, value, f"{name}={value!r}; wanted a finite number from 0") for name in ("initializer_range", "lambda_std")
      for value in (NAN, -0.1, 1e300, "x")),
    *((name, value, f"{name}={value!r}; wanted true or false")
      for name in ("use_cache", "tie_word_embeddings", "subln_affine", "pairs_share_group", "attention_bias",
                   "attention_output_bias", "mlp_bias", "qk_norm") for value in ("yes", 1, None)),
    *((name, value, f"{name}=") for name in ("pad_token_id", "bos_token_id", "eos_token_id")
      for value in (-1, "0", 1.5, True)),
    *((name, 300, f"{name} is 300; wanted ids from 0 to 299") for name in ("pad_token_id", "bos_token_id")),
    ("eos_token_id", [0, 10**12], "eos_token_id is [0, 1000000000000]"), ("eos_token_id", [0, None], "eos_token_id="),
    *(("rope_theta", value, "rope_theta=") for value in (0, -1, NAN, "1e4")),
    *(("rope_parameters", value, "rope_parameters=") for value in (5, "default", [])),
    *(("rope_parameters", value, says) for value, says in (
        ({"rope_theta": 0}, "rope_parameters: rope_theta=0"), ({"rope_type": "foo"}, "rope_type is 'foo'"),
        ({"rope_type": ["yarn"]}, "rope_type is ['yarn']"), ({"rope_type": "linear"}, "lack factor"),
        ({"rope_type": "linear", "factor": NAN}, "rope_parameters: factor=nan"),
        ({"rope_type": "dynamic", "factor": 0}, "rope_parameters: factor=0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (YARN | {"factor": "2"}, "rope_parameters: factor='2'"), (YARN | {"beta_fast": INF}, "beta_fast=inf"),
        (YARN | {"mscale": NAN}, "mscale=nan"), (YARN | {"attention_factor": -1}, "attention_factor=-1"),
        (LONG | {"short_factor": [1.0, NAN, 1.0, 1.0, 1.0]}, "rope_parameters: short_factor="),
        (LONG | {"long_factor": [1.0]}, "long_factor of rope_parameters has 1 numbers; wanted 5"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor of rope_parameters is 1.0"),
        (LLAMA3 | {"low_freq_factor": None}, "rope_parameters: low_freq_factor="),
        ({"rope_type": "llama3", "factor": 4.0}, "lack low_freq_factor"))),
    *(("hidden_act", value, "hidden_act") for value in ("x", 5, None, ["silu"])),
    *(("dtype", value, f"dtype={value!r}; wanted one of float32, ") for value in (0, "float7", "int8", [], True)),
    *(("attention", value, "attention=") for value in ("diff", None, 1, ["diff_v1"])),
    *(("lambda_init", value, "lambda_init=") for value in (NAN, 1, 1.5, "0.8", True)),
    ("lambda_form", "tanh", "lambda_form='tanh'"), ("head_norm", "no", "head_norm='no'"),
    ("dex_heads", [[0], 1], "dex_heads="), ("dex_heads", [[0], [0], [0]], "wanted attention='dex'"),
    *(("sliding_window", value, f"sliding_window={value!r}; wanted an integer from 2") for value in (1, 0, "8", 2.0)),
    ("layer_types", ["full_attention"], "layer_types with 1 names; wanted one for each of the "),
    ("layer_types", ["chunked_attention"], "layer_types=['chunked_attention']; wanted a list of full_attention and "),
    ("unrotated_layers", [99], "unrotated_layers is [99]; wanted each of 0 to "),
    ("is_causal", "no", "is_causal='no'; wanted true or false"), ("num_labels", 10**12, "num_labels="),
    ("is_encoder_decoder", True, "is_encoder_decoder="),
    ("num_attention_heads", 7, "num_attention_heads=7"),
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
        "and the model knows 300; wanted the model's own tokenizer",
    ),
    "weights NaN": (number(NAN), f"holds a NaN or an infinity in {ONE}"),
    "weights Inf": (number(INF), f"holds a NaN or an infinity in {ONE}"),
    "weights −Inf in half": (one(lambda w: w.half().index_fill(0, torch.tensor([66]), -INF)), "NaN or an infinity"),
    "weights NaN in bfloat16": (one(lambda w: w.bfloat16().fill_(NAN)), "NaN or an infinity"),
    "weights too large": (weights(lambda tensors: [each.fill_(3e38) for each in tensors.values()]), "logits are no"),
    "weights renamed": (weights(lambda tensors: tensors.update({"model.x": tensors.pop(ONE)})), f"lack {ONE}"),
    "weights missing": (weights(lambda tensors: tensors.pop(ONE)), f"lack {ONE}"),
    "weights extra": (weights(lambda tensors: tensors.update({"a\nb": torch.ones(3)})), "hold 'a\\nb', which"),
    "weights transposed": (one(lambda w: w.T.contiguous()), f"{ONE} is 61×67 there and 67×61 by config.json"),
    "weights of size 0": (one(lambda w: w[:0]), f"{ONE} is 0×61 there"),
    "weights int8": (one(lambda w: w.to(torch.int8)), "is I8; wanted floating-point weights of at least 16 bits"),
    "weights bool": (one(lambda w: w > 0), "is BOOL; wanted floating-point weights"),
    "weights float8": (one(lambda w: w.to(torch.float8_e4m3fn)), "is F8_E4M3; wanted floating-point weights"),
    "weights complex": (one(lambda w: w.to(torch.complex64)), "is C64; wanted floating-point weights"),
    "no tensor": (weights(lambda tensors: tensors.clear()), "num_hidden_layers is 3 and the weights are 0 tensors"),
    "weights empty": (file(WEIGHTS, b""), "is damaged"),
    "weights cut": (half(WEIGHTS), "is damaged"),
    "header deep": (header(_DEEP), "its header is no JSON object"),
    "header of long numbers": (
        header(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,%b]}}' % (b"9" * 4300, b"9" * 4300)), "impossible",
    ),
    "header of fractions": (
        header(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0.0,4.0]}}', b"1234"), "impossible facts",
    ),
    "header below 0": (header(b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', b"1234"), "impossible"),
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


# Each verb that reads a model's folder, and how it ends where the folder is whole is tested elsewhere.
VERBS = {
    "lens": ["lens", "MODEL", "--text", "low lower", "--html", "made/lens.html"],
    "eval": ["eval", "outliers", "MODEL", "--text", "corpus.txt", "--png", "made/study.png"],
    "convert": ["convert", "MODEL", "made", "--to", "diffllama"],
    "export": ["export", "MODEL", "--onnx", "--out", "made"],
    "train": ["train", "--from", "MODEL", "--text", "corpus.txt", "--out", "made"],
    "serve": ["serve", "MODEL", "--port", "0"],
    "plan": ["plan", "--model", "MODEL"],
    "demo": ["demo", "MODEL", "--out", "made/demo.html"],
}
KINDS = {
    "an ε that is no number": (fields(rms_norm_eps=NAN), "rms_norm_eps=nan"),
    "layers without end": (fields(num_hidden_layers=10**12), "=1000000000000; wanted an integer of at most"),
    "a size as a word": (fields(hidden_size="4096"), "hidden_size='4096'"),
    "a factor that is no number": (fields(rope_parameters=YARN | {"factor": NAN}), "factor=nan"),
    "positions as a word": (fields(max_position_embeddings="many"), "max_position_embeddings='many'"),
    "deep JSON": (file("config.json", b"[" * 100_000), "nested too deeply"),
    "weights cut": (half(WEIGHTS), "is damaged"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_it_in_one_line_and_writes_nothing(
    verb: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, says = KINDS[kind]
    damage(folder)
    monkeypatch.chdir(folder.parent)
    Path("corpus.txt").write_text("low lower lowest\n\n" * 300)
    capsys.readouterr()
    assert main([str(folder) if word == "MODEL" else word for word in VERBS[verb]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]
    assert [line for line in err.splitlines() if line.startswith("diffattn: ")] == err.splitlines()[-1:]
    assert not [path for path in Path("made").rglob("*") if path.is_file()]


@pytest.mark.parametrize("verb", ["lens", "eval", "convert", "export", "train", "demo"])
def test_weights_that_are_no_numbers_are_found_by_every_verb_that_reads_them(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number(NAN)(folder)
    monkeypatch.chdir(folder.parent)
    Path("corpus.txt").write_text("low lower lowest\n\n" * 300)
    assert main([str(folder) if word == "MODEL" else word for word in VERBS[verb]]) == 2
    assert f"holds a NaN or an infinity in {ONE}" in capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in Path("made").rglob("*") if path.is_file()]


LENS = {
    "no text": (["--text", ""], "the text has 0 tokens; wanted 2 to 2,048"),
    "half a character": (["--text", "low\udcff"], "character 3 of the text is no text; wanted a text in UTF-8"),
    "a longer text than the model reads": (["--text", "low " * 300], "tokens"),
    "an answer of nothing": (["--text", "low lower", "--answer", ""], "the answer '' is not in the text"),
    "an answer of a space": (["--text", "low lower", "--answer", " "], "the answer ' ' is not in the text"),
    "an answer of half a character": (
        ["--text", "low", "--answer", "\udcff"],
        "the answer '\\udcff' is not in the text",
    ),
}


@pytest.mark.parametrize(("words", "says"), LENS.values(), ids=list(LENS))
def test_texts_that_show_nothing_are_one_line(
    words: list[str], says: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", str(whole), *words, "--html", str(tmp_path / "lens.html"), "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "lens.html").exists()


@pytest.mark.parametrize("loader", [DiffTransformerForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (fields(rms_norm_eps=NAN), "rms_norm_eps=nan"),
        (fields(num_hidden_layers=10**12), "an integer of at most"),
        (fields(num_hidden_layers=400_000), "the weights are 44 tensors"),
        (fields(num_hidden_layers=4), r"lack model\.layers\.3\.input_layernorm"),
        (fields(intermediate_size=70), "is 61×67 there and 61×70 by config"),
        (half(WEIGHTS), "is damaged"),
    ],
)
def test_the_librarys_own_way_to_load_a_model_refuses_it_too(
    damage: Damage, says: str, loader: Any, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(DiffattnError, match=says) as caught:
        loader.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_field_that_cannot_be_is_refused_when_it_is_assigned_or_overridden(folder: Path) -> None:
    config = DiffTransformerConfig.from_pretrained(folder)
    with pytest.raises(DiffattnError, match="rms_norm_eps=nan"):
        config.rms_norm_eps = NAN
    with pytest.raises(DiffattnError, match="rms_norm_eps=-1"):
        DiffTransformerConfig.from_pretrained(folder, rms_norm_eps=-1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rms_norm_eps": NAN}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": {"__float__": "NaN"}}, "rms_norm_eps=nan"),
        ({"hidden_size": 10**12}, "an integer of at most"),
        ({"num_hidden_layers": 400_000}, "the weights are 21 tensors"),
        ({"vocab_size": 10**7}, "are 22,584 numbers, and the model of config.json has 480,008,184"),
        ({"rope_parameters": {"rope_type": "linear", "factor": NAN, "rope_theta": 1e4}}, "factor=nan"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"hidden_act": "x"}, "cannot be loaded here"),
        ({"num_attention_heads": 0}, "describes no model"),
        ({"num_key_value_heads": 0}, "cannot be loaded here"),
        ({"tie_word_embeddings": "yes"}, "describes no model"),
    ],
    ids=str,
)
def test_another_librarys_model_is_held_against_its_header_as_well(
    changed: dict[str, Any], says: str, tmp_path: Path, whole: Path
) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    os.link(whole / "tokenizer.json", tmp_path / "tokenizer.json")
    load(tmp_path, device="cpu")
    fields(**changed)(tmp_path)
    with pytest.raises(DiffattnError, match=re.escape(says)) as caught:
        load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_every_field_of_our_configuration_is_in_the_table() -> None:
    theirs = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert {field.name for field in dataclasses.fields(DiffTransformerConfig)} - theirs <= FIELDS.keys()

"""Every direction of the table on folders: what is written loads, computes the same, and the command line says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_folders import EXTRA, SIZES, logits, make_folder
from support.small_models import ROUNDING

from diffattn.cli.main import main
from diffattn.convert.convert import DIRECTIONS, OBVIOUS, TARGETS, Conversion, convert
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError


@pytest.mark.parametrize(("kind", "target"), DIRECTIONS)
def test_what_is_written_loads_and_computes_the_same(kind: str, target: str, tmp_path: Path) -> None:
    source = make_folder(kind, tmp_path / "source", target=target)
    result = convert(source, tmp_path / "made", target)
    expected = logits(source)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(tmp_path / "made"), expected, rtol=0, atol=10 * ROUNDING)

    weights = load_file(tmp_path / "made" / "model.safetensors")
    assert result.same_function
    assert result.parameters == sum(tensor.numel() for tensor in weights.values())
    assert result.bytes == 4 * result.parameters
    assert result.source_parameters == sum(t.numel() for t in load_file(source / "model.safetensors").values())
    assert {result.source, result.target} <= {kind, target, "qwen2", "llama", "mistral"}
    for name, text in EXTRA.items():
        assert (tmp_path / "made" / name).exists() == (name != "README.md")
        assert name == "README.md" or (tmp_path / "made" / name).read_text() == text
    assert not list(tmp_path.glob("*.partial"))


THERE_AND_BACK = [
    (kind, target) for kind, target in DIRECTIONS if target in ("diffllama", "reference", "llama", "motif")
]


@pytest.mark.parametrize(("kind", "target"), THERE_AND_BACK)
def test_there_and_back_changes_no_bit(kind: str, target: str, tmp_path: Path) -> None:
    source = make_folder(kind, tmp_path / "source", target=target)
    convert(source, tmp_path / "there", target)
    result = convert(tmp_path / "there", tmp_path / "back")
    assert result.target == kind
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert configs[0] == {name: value for name, value in configs[1].items() if name != "converted"}


def test_the_obvious_target_is_taken(tmp_path: Path) -> None:
    for kind, target in OBVIOUS.items():
        source = make_folder(kind, tmp_path / kind)
        assert convert(source, tmp_path / f"{kind} made").target == target


def test_bfloat16_stays_and_lambda_is_float32(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source", dtype=torch.bfloat16)
    result = convert(source, tmp_path / "made")
    assert result.dtype == "bfloat16"
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "made" / "model.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if ".lam." in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in weights.items() if ".lam." not in name} == {torch.bfloat16}
    assert logits(tmp_path / "made").dtype == torch.bfloat16


def test_a_dtype_that_the_source_does_not_name_is_that_of_its_weights(tmp_path: Path) -> None:
    source = make_folder("reference V1", tmp_path / "source", dtype=torch.bfloat16)
    convert(source, tmp_path / "made")
    assert logits(tmp_path / "made").dtype == torch.bfloat16


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source", max_shard_size=60_000)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    convert(source, tmp_path / "made", max_shard_size=50_000)
    assert len(list((tmp_path / "made").glob("model-*.safetensors"))) > 3
    torch.testing.assert_close(logits(tmp_path / "made"), logits(source), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_half_precision_stay_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_folder("llama", tmp_path / "source", dtype=dtype, max_shard_size=30_000)
    for to in ("softmax", "diff_v2", "dex"):
        done = convert(source, tmp_path / to, to, max_shard_size=30_000)
        assert done.dtype == str(dtype).removeprefix("torch.")
        assert json.loads((tmp_path / to / "config.json").read_text())["dtype"] == done.dtype
        before, made = (
            {name: tensor for file in folder.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
            for folder in (source, tmp_path / to)
        )
        assert len(list((tmp_path / to).glob("model-*.safetensors"))) > 2
        assert {tensor.dtype for name, tensor in made.items() if ".dex." not in name} == {dtype}
        changed = ("q_proj", "o_proj") if to == "diff_v2" else ()
        for name, tensor in before.items():
            assert any(part in name for part in changed) or torch.equal(made[name], tensor)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sliding_window": 8}, "sliding_window is 8; wanted None, since"),
        ({"unrotated_layers": [1]}, r"unrotated_layers is \[1\]; wanted None, since"),
        ({"is_causal": False}, "is_causal is False; wanted True, since"),
        ({"hidden_act": "poly_norm"}, "hidden_act is 'poly_norm'; wanted a function that transformers knows"),
    ],
)
@pytest.mark.parametrize("to", ["diffllama", "reference"])
def test_what_other_programs_have_not_is_refused_on_the_way_back(
    to: str, fields: dict, words: str, tmp_path: Path
) -> None:
    source = make_folder("diff_v1", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UnsupportedError, match=words):
        convert(source, tmp_path / "made", to)


def test_an_odd_number_of_key_heads_is_noted(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    weights = load_file(source / "model.safetensors")
    rows = 3 * SIZES["head_dim"]
    cut = {n: t[:rows].clone() if n.endswith(("k_proj.weight", "v_proj.weight")) else t for n, t in weights.items()}
    save_file(cut, source / "model.safetensors", metadata={"format": "pt"})
    result = convert(source, tmp_path / "made")
    assert result.parameters - result.source_parameters == 3 * 2 * rows * SIZES["hidden_size"]
    assert any("3 key/value heads" in note and "twice" in note for note in result.notes)


def test_noise_is_said_to_change_the_function(tmp_path: Path) -> None:
    source = make_folder("softmax", tmp_path / "source")
    result = convert(source, tmp_path / "made", "diff_v2", noise="perturbed", noise_std=0.5, seed=3)
    assert not result.same_function
    assert result.exact.startswith("not the same function")
    assert (logits(tmp_path / "made") - logits(source)).abs().max() > 100 * ROUNDING


def test_dex_heads_are_one_list_or_one_for_each_layer(tmp_path: Path) -> None:
    source = make_folder("softmax", tmp_path / "source")
    for number, (heads, found) in enumerate((([1, 4], [[1, 4]] * 3), ([[1], [], [0, 2]], [[1], [], [0, 2]]))):
        convert(source, tmp_path / str(number), "dex", heads=heads)
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["dex_heads"] == found
        torch.testing.assert_close(logits(tmp_path / str(number)), logits(source), rtol=0, atol=ROUNDING)
    with pytest.raises(ConfigError, match="dex_heads with 2 lists"):
        convert(source, tmp_path / "wrong", "dex", heads=[[1], [2]])


def test_a_source_without_a_tokenizer_is_converted_with_a_note(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    assert convert(source, tmp_path / "made").notes == ()
    for name in EXTRA:
        (source / name).unlink()
    result = convert(source, tmp_path / "again")
    assert [note for note in result.notes if "no tokenizer" in note]


@pytest.mark.parametrize(
    ("kind", "target", "options", "error", "words"),
    [
        ("diff_v1", None, {}, ConfigError, "no obvious target; wanted --to diffllama, motif or reference"),
        ("diff_v1", "diff_v1", {}, UnsupportedError, "a diff_v1 model already"),
        ("diff_v1", "diff_v2", {}, UnsupportedError, "no exact conversion from diff_v1 to diff_v2"),
        ("diff_v1", "softmax", {}, UnsupportedError, "wanted one to diffllama, motif or reference"),
        ("diffllama", "diffllama", {}, UnsupportedError, "model already"),
        ("diffllama", "diff_v2", {}, UnsupportedError, "wanted one to diff_v1"),
        ("reference V1", "reference", {}, UnsupportedError, "model already"),
        ("reference V1", "diff_v2", {}, UnsupportedError, "wanted one to diff_v1"),
        ("llama", "llama", {}, UnsupportedError, "model already"),
        ("llama", "diff_v1", {}, UnsupportedError, "wanted one to softmax, diff_v2, diff_gda_v2 or dex"),
        ("diffllama", "v1", {}, ConfigError, "to is 'v1'; wanted one of softmax"),
        (
            "diffllama",
            "diff_v1",
            {"noise": "copy"},
            ConfigError,
            "option noise .* to diff_v1; wanted no option",
        ),
        ("llama", "dex", {"seed": 0}, ConfigError, "wanted only heads"),
    ],
)
def test_no_direction_is_guessed(kind, target, options, error, words, tmp_path: Path) -> None:
    source = make_folder(kind, tmp_path / "source")
    with pytest.raises(error, match=words) as caught:
        convert(source, tmp_path / "made", target, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model_type": "gpt2"}, UnsupportedError, "model_type is 'gpt2', which has LayerNorm .*; wanted one of llama"),
        ({"model_type": None}, UnsupportedError, "model_type is None"),
        ({"model_type": ["llama"]}, UnsupportedError, "model_type is"),
        ({"model_type": "diff_transformer", "attention": "diff_v3"}, ConfigError, "attention is 'diff_v3'"),
        ({"model_type": "diff_transformer_reference", "version": 3}, ConfigError, "version is 3"),
        ({"vocab_size": 72}, CheckpointError, "embed_tokens.weight is 71×61; wanted 72×61"),
        ({"num_hidden_layers": 4}, CheckpointError, "lack model.layers.3"),
        ({"num_hidden_layers": 1}, CheckpointError, "hold model.layers.1"),
        ({"num_hidden_layers": -1}, ConfigError, "num_hidden_layers"),
        ({"num_attention_heads": "many"}, ConfigError, "config.json is no diffllama model"),
        ({"num_hidden_layers": 1_000_000}, CheckpointError, "num_hidden_layers is 1,000,000 and the weights are 42"),
        ({"dtype": 2.5}, ConfigError, "dtype is 2.5"),
        ({"dtype": "x"}, ConfigError, "config.json is no diffllama model"),
        ({"pad_token_id": 72}, ConfigError, "config.json is no diff_transformer model"),
        ({"hidden_act": ["silu"]}, ConfigError, "config.json is no diffllama model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields, error, words, tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(error, match=words) as caught:
        convert(source, tmp_path / "made", "diff_v1")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name][0, 1] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"holds a NaN or an infinity in {name}"):
        convert(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command_line_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "made"), "--json"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert (facts["from"], facts["to"], facts["folder"]) == ("diffllama", "diff_v1", str(tmp_path / "made"))
    assert facts.keys() == {"from", "to"} | Conversion.__dataclass_fields__.keys() - {"source", "target"}
    lines = printed.err.splitlines()
    assert lines[0].startswith("diffllama → diff_v1: heads paired")
    assert f"{facts['parameters']:,} parameters" in lines[1]
    assert len(lines) == 2


def test_the_command_line_takes_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder("llama", tmp_path / "source")
    noise = ["--noise", "perturbed", "--noise-std", "0.5", "--seed", "2"]
    assert main(["convert", str(source), str(tmp_path / "v2"), "--to", "diff_v2", *noise]) == 0
    converted = json.loads((tmp_path / "v2" / "config.json").read_text())["converted"]
    assert (converted["noise"], converted["noise_std"], converted["seed"]) == ("perturbed", 0.5, 2)
    assert main(["convert", str(source), str(tmp_path / "dex"), "--to", "dex", "--dex-heads", "0,2/1/"]) == 0
    assert json.loads((tmp_path / "dex" / "config.json").read_text())["dex_heads"] == [[0, 2], [1], []]
    assert main(["convert", str(source), str(tmp_path / "all"), "--to", "dex", "--dex-heads", "3"]) == 0
    assert json.loads((tmp_path / "all" / "config.json").read_text())["dex_heads"] == [[3]] * 3
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments", [["--to", "dex", "--dex-heads", "a"], ["--to", "diff_v3"], ["--dex-heads", "1"], ["--to", "llama"]]
)
def test_a_mistake_is_one_line_and_status_2(arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder("llama", tmp_path / "source")
    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "made"), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_every_target_has_a_direction() -> None:
    assert {target for _, target in DIRECTIONS} == set(TARGETS)
    assert all(pair in DIRECTIONS for pair in OBVIOUS.items())


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    convert(source, tmp_path / "made")
    shutil.rmtree(tmp_path / "made")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before

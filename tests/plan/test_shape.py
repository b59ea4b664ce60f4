import dataclasses
import re
from importlib import resources
from pathlib import Path

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.named_model import load_shape
from diffattn.plan.shape import ModelShape, presets
from diffattn.variants import VARIANTS

SMALL = {"hidden_size": 60, "num_layers": 3, "num_heads": 6, "intermediate_size": 164, "vocab_size": 131}


def small(**changes: object) -> ModelShape:
    return ModelShape(**{**SMALL, **changes})


def refused(call, *wanted: str) -> None:
    """Every error is one line of three parts (what was given, what is wanted, the way out) and holds these words."""
    with pytest.raises(ConfigError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert re.search(r"; wanted .+: .+", line), line
    for words in wanted:
        assert words in line, line


def test_defaults():
    shape = small()
    assert (shape.num_kv_heads, shape.head_dim) == (6, 10)
    assert shape.tie_word_embeddings is True
    assert (shape.max_position_embeddings, shape.rope_theta) == (2048, 10000.0)
    assert (shape.name, shape.source) == ("", "")


def test_frozen_hashable_and_replaceable():
    shape = small(num_kv_heads=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.hidden_size = 64
    assert hash(shape) == hash(small(num_kv_heads=2))
    assert dataclasses.replace(shape, intermediate_size=100) == small(num_kv_heads=2, intermediate_size=100)


def test_explicit_head_dim_frees_the_hidden_size():
    shape = small(hidden_size=61, head_dim=14)
    assert (shape.num_heads * shape.head_dim, shape.hidden_size) == (84, 61)


@pytest.mark.parametrize("value", [0, -3, True, 8.0, "8", None])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_sizes_are_positive_integers(key, value):
    if value is None and key in ("num_kv_heads", "head_dim"):
        assert small(**{key: None}) == small()
    else:
        refused(lambda: small(**{key: value}), f"{key}={value!r}", "wanted a positive integer")


def test_impossible_numbers_are_refused():
    refused(lambda: small(hidden_size=61), "hidden_size=61 with num_heads=6", "set head_dim")
    refused(lambda: small(num_kv_heads=4), "num_kv_heads=4", "divides num_heads", "num_kv_heads=6")
    refused(lambda: small(head_dim=7), "head_dim=7", "even", "RoPE", "head_dim=8")
    refused(lambda: small(hidden_size=66), "head_dim=11")
    refused(lambda: small(tie_word_embeddings=1), "tie_word_embeddings=1", "true or false")
    refused(lambda: small(name=3), "name=3", "wanted text")


@pytest.mark.parametrize("theta", [0, -1.0, True, "10000", float("nan"), float("inf"), None])
def test_rope_theta_is_a_finite_positive_number(theta):
    refused(lambda: small(rope_theta=theta), f"rope_theta={theta!r}", "10000.0")


def test_every_variant_accepts_even_heads():
    for attention in VARIANTS:
        small(num_kv_heads=2).check_variant(attention)


def test_v1_needs_pairs_and_v2_does_not():
    odd_heads = small(num_heads=5)
    odd_groups = small(num_kv_heads=3)
    refused(lambda: odd_heads.check_variant("diff_v1"), "num_heads=5 for diff_v1", "a multiple of 2", "diff_v2")
    refused(lambda: odd_groups.check_variant("diff_v1"), "num_kv_heads=3 for diff_v1", "set num_kv_heads=6", "diff_v2")
    small(num_kv_heads=6).check_variant("diff_v1")
    for attention in ("softmax", "diff_v2"):
        odd_heads.check_variant(attention)
        odd_groups.check_variant(attention)


def test_unknown_variant_names_the_known_and_the_nearest():
    refused(lambda: small().check_variant("diffv1"), "'diffv1'", "softmax, diff_v1, diff_v2", "mean diff_v1?")
    refused(lambda: small().check_variant(None), "attention=None", "softmax, diff_v1, diff_v2")


def test_presets_are_listed_smallest_first_and_name_their_source():
    assert presets() == ("300K", "3M", "30M", "830M", "1.4B", "2.8B", "3B", "6.8B", "13.1B")
    for name in presets():
        shape = ModelShape.preset(name)
        assert shape.name == name
        assert re.search(r"arXiv 2410\.05258v2, (Table|Appendix)|^diffattn, ", shape.source)
        for attention, variant in VARIANTS.items():
            (shape.grouped(shape.num_heads // 2) if variant.shares_noise else shape).check_variant(attention)


@pytest.mark.parametrize(
    ("name", "D", "layers", "v1_heads", "d", "width"),
    [
        ("830M", 1536, 24, 8, 96, 4096),
        ("1.4B", 2048, 24, 8, 128, 5461),
        ("2.8B", 2560, 32, 10, 128, 6912),
        ("6.8B", 4096, 32, 16, 128, 10880),
        ("13.1B", 5120, 40, 20, 128, 13696),
        ("3B", 3072, 28, 12, 128, 8192),
    ],
)
def test_the_papers_sizes(name, D, layers, v1_heads, d, width):
    shape = ModelShape.preset(name)
    assert (shape.hidden_size, shape.num_layers, shape.num_heads // 2) == (D, layers, v1_heads)
    assert (shape.head_dim, shape.intermediate_size, shape.vocab_size) == (d, width, 100_288)
    assert shape.num_kv_heads == shape.num_heads
    assert shape.num_heads * shape.head_dim == shape.hidden_size
    assert shape.max_position_embeddings == (4096 if name == "3B" else 2048)


def test_the_sizes_of_the_comparison():
    assert [ModelShape.preset(name).max_position_embeddings for name in ("300K", "3M")] == [64, 256]
    assert [ModelShape.preset(name).vocab_size for name in ("300K", "3M", "30M")] == [512, 4096, 8192]


def test_unknown_preset_lists_the_presets():
    refused(lambda: ModelShape.preset("3Mb"), "'3Mb'", ", ".join(presets()), "did you mean 3M?", ".toml")
    refused(lambda: load_shape("nothing like it"), "'nothing like it'", ", ".join(presets()))


def write(folder: Path, text: str | bytes, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


TOML = "\n".join(f"{key} = {value}" for key, value in SMALL.items())


def test_from_toml_gives_the_shape_and_the_stem_as_its_name(tmp_path):
    path = write(tmp_path, TOML + "\nnum_kv_heads = 2\nrope_theta = 500000\n")
    shape = small(num_kv_heads=2, rope_theta=500_000, name="mine")
    assert ModelShape.from_toml(path) == shape
    assert load_shape(path) == load_shape(str(path)) == shape
    assert ModelShape.from_toml(write(tmp_path, TOML + '\nname = "other"')).name == "other"


def test_load_takes_a_file_of_any_ending_but_a_presets_name_wins(tmp_path, monkeypatch):
    write(tmp_path, TOML, "shape.txt")
    write(tmp_path, TOML, "3M")
    monkeypatch.chdir(tmp_path)
    assert load_shape("shape.txt") == small(name="shape")
    assert load_shape("3M") == ModelShape.preset("3M")
    assert load_shape("./3M") == small(name="3M")


def test_presets_are_the_files_that_ship():
    for file in resources.files("diffattn.plan").joinpath("presets").iterdir():
        with resources.as_file(file) as path:
            assert ModelShape.from_toml(path) == ModelShape.preset(path.stem)


def test_bad_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "mine.toml"
    refused(lambda: load_shape(path), str(path), "is not there")
    refused(lambda: ModelShape.from_toml(tmp_path), str(tmp_path), "cannot be read")
    for text, words in [
        (TOML + "\nnum_kv_heads =\n", ("valid TOML", "line 6")),
        (b"name = '\xff'", ("UTF-8", "byte 8")),
        (TOML + "\nhiden_size = 3", ("unknown key 'hiden_size'", "did you mean hidden_size?")),
        (TOML + "\nzzz = 3", ("unknown key 'zzz'", "intermediate_size, vocab_size")),
        ("[shape]\n" + TOML, ("unknown key 'shape'",)),
        (TOML.replace("num_layers = 3\n", ""), ("has no num_layers;",)),
        ("", ("has no hidden_size, num_layers, num_heads, intermediate_size, vocab_size;",)),
        (TOML.replace("= 164", "= 164.5"), ("mine.toml", "intermediate_size=164.5")),
        (TOML + "\nhead_dim = 3", ("mine.toml", "head_dim=3")),
        (TOML + "\nrope_theta = 'big\\n'", ("mine.toml", "rope_theta=")),
    ]:
        write(tmp_path, text)
        refused(lambda: load_shape(path), *words)

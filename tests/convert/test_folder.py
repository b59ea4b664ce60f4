"""Folders that are read without a copy, refused in one line with nothing written, and written whole."""

import errno
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama_folders import logits, make_folder
from support.small_folders import small_tokenizer

from diffattn.convert import folder as folder_module
from diffattn.convert.convert import convert
from diffattn.convert.folder import check_destination, check_loads, read_folder, write_folder
from diffattn.errors import CheckpointError, ConfigError, TrainingError
from diffattn.model.loading import load_tokenizer

WEIGHTS = "model.safetensors"


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def grown(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes() + b"\0" * 8)


def header_beyond_the_file(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


def garbage_header(folder: Path) -> None:
    file = folder / WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[8:40] = os.urandom(32)
    file.write_bytes(raw)


def tampered_header(folder: Path) -> None:
    """One tensor is said to lie where another one does."""
    file = folder / WEIGHTS
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name.endswith("gate_proj.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def empty_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def pickle(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        # A pickle that would say so if it were ever loaded.
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch loaded'\ntR.")

    return change


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def lacking(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.1.self_attn.lambda_k1"]
    save_file(weights, folder / WEIGHTS)


def one_more(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"model.layers.0.extra": torch.ones(3)}, folder / WEIGHTS)


def another_shape(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {name: weights[name][:-10].clone()}, folder / WEIGHTS)


REFUSED = {
    "cut off": (cut, "is damaged: it has .* bytes and its header describes"),
    "grown": (grown, "is damaged: it has .* bytes and its header describes"),
    "header beyond the file": (header_beyond_the_file, "is damaged: its header should be 1,099,511,627,776 bytes"),
    "garbage header": (garbage_header, "is damaged: its header is no JSON object"),
    "tampered header": (tampered_header, "is damaged: .*belong to no tensor, or to two"),
    "empty file": (empty_weights, "is damaged: it has no header"),
    "pickle": (
        pickle("pytorch_model.bin"),
        r"pytorch_model\.bin, a pickle.*never loaded; wanted weights in safe",
    ),
    "pt": (pickle("model.pt"), r"model\.pt, a pickle"),
    "pth": (pickle("consolidated.00.pth"), "a pickle"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "no config": (no_config, r"holds no config\.json"),
    "config no JSON": (config("{"), "is damaged: it is no JSON"),
    "config no object": (config("[1]"), "it holds a list; wanted a file with a JSON object"),
    "config not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}") and None, "it is no JSON"),
    "a tensor missing": (lacking, r"lack model\.layers\.1\.self_attn\.lambda_k1; wanted the \d+ tensors"),
    "a tensor too many": (one_more, r"hold model\.layers\.0\.extra, for which the model has no place"),
    "another shape": (another_shape, r"q_proj\.weight is 110×61; wanted 120×61"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_source_is_one_line_and_nothing_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_folder("diffllama", tmp_path / "source")
    change, words = REFUSED[name]
    change(source)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(source, tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        convert(tmp_path / "absent", tmp_path / "made")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file' is a file"):
        convert(tmp_path / "file", tmp_path / "made")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source", max_shard_size=60_000)
    shards = sorted(source.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"names {re.escape(shards[1].name)}, which is not there \(1 of "):
        convert(source, tmp_path / "made")


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source", max_shard_size=60_000)
    index = source / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    weights["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(weights))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./other\.safetensors'"):
        convert(source, tmp_path / "made")


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    size = 1 << 27
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    before = anonymous_bytes()
    checkpoint = read_folder(tmp_path)
    assert checkpoint.tensors["x"].sum() == 0
    write_folder(tmp_path / "made", {"model_type": "x"}, checkpoint.tensors)
    assert anonymous_bytes() - before < size // 8
    assert (tmp_path / "made" / WEIGHTS).stat().st_size > size


def test_links_are_followed_as_a_download_cache_has_them(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in source.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    convert(tmp_path / "snapshot", tmp_path / "made")
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_more_chat_templates_are_taken_along(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ y }}")
    convert(source, tmp_path / "made")
    assert (tmp_path / "made" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ y }}"


def test_a_given_chat_template_takes_the_place_of_every_other(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "old {{ messages[0].content }}"
    tokenizer.save_pretrained(source)
    facts = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(facts | {"chat_template": "older"}))
    template = "new {{ messages[0].content }}"
    convert(source, tmp_path / "made", chat_template=template)
    assert load_tokenizer(tmp_path / "made").chat_template == template
    convert(source, tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").chat_template == "old {{ messages[0].content }}"
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"a chat template, and .* holds no tokenizer"):
        convert(source, tmp_path / "third", chat_template=template)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("source", "is '.*source' or lies inside it"),
        ("source/made", "lies inside it"),
        ("source/../source/a/b", "lies inside it"),
        ("link", "lies inside it"),
        (".", "is not empty"),
        ("full", "is not empty"),
        ("full/file", "file' is a file"),
        ("full/file/made", "Not a directory"),
    ],
)
def test_a_destination_that_holds_something_is_refused(destination: str, words: str, tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=words) as caught:
        convert(source, tmp_path / destination)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_destination_may_be_empty_deep_or_a_link(tmp_path: Path) -> None:
    source = make_folder("diffllama", tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    for name in ("empty", "deep/er", "link"):
        convert(source, tmp_path / name)
        torch.testing.assert_close(logits(tmp_path / name), logits(source), rtol=0, atol=1e-5)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, TrainingError), (errno.EROFS, ConfigError)])
def test_a_write_that_fails_leaves_nothing(
    number: int, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder("diffllama", tmp_path / "source")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_module, "save_torch_state_dict", fail)
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_would_not_load_is_not_written(tmp_path: Path) -> None:
    source = read_folder(make_folder("diffllama", tmp_path / "source"))
    check_loads(source.config, source.tensors)
    name = "model.layers.2.self_attn.lambda_q1"
    for wrong in (
        {key: tensor for key, tensor in source.tensors.items() if key != name},
        source.tensors | {"model.norm.bias": torch.ones(61)},
        source.tensors | {name: torch.ones(11)},
    ):
        with pytest.raises(CheckpointError):
            check_loads(source.config, wrong)


def test_a_path_is_absolute_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_destination("source", "made") == (tmp_path / "made").resolve()

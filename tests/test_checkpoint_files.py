import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from diffattn.checkpoint_files import check_safetensors, read_config, read_tensors, weight_files
from diffattn.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.zeros(0, 3),
    "c": torch.tensor(True),
    "d": torch.ones(3).half(),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def index(folder, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_whole_file_is_described_by_its_header(file):
    header = check_safetensors(file)
    assert {name: entry["shape"] for name, entry in header.items()} == {"a": [2, 3], "b": [0, 3], "c": [], "d": [3]}
    assert {name: entry["dtype"] for name, entry in header.items()} == {"a": "F32", "b": "F32", "c": "BOOL", "d": "F16"}


def test_a_file_that_was_cut_anywhere_or_grew_is_refused(file):
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            check_safetensors(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=rf"it has {len(whole) + 1} bytes and its header describes {len(whole)}"):
        check_safetensors(file)


def test_a_header_of_which_a_byte_was_changed_is_refused_or_still_describes_the_file(file):
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for place in range(end):
        for value in (0, whole[place] ^ 1, ord("9"), ord("-"), 0xFF):
            file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                header = check_safetensors(file)
            except CheckpointError:
                refused += 1
                continue
            assert max(entry["data_offsets"][1] for entry in header.values()) == len(whole) - end
    assert refused > end


def test_tensors_that_overlap_or_leave_a_hole_are_refused(file):
    for second in ([2, 4], [3, 5], [0, 2]):
        header = {name: {"dtype": "U8", "shape": [2], "data_offsets": place} for name, place in
                  (("x", [0, 2]), ("y", second))}  # fmt: skip
        raw = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(second[1]))
        if second == [2, 4]:
            assert set(check_safetensors(file)) == {"x", "y"}
        else:
            with pytest.raises(CheckpointError, match="belong to no tensor, or to two"):
                check_safetensors(file)


def test_one_file_or_those_of_an_index(file, tmp_path):
    assert weight_files(tmp_path) == [file]
    file.rename(tmp_path / "two.safetensors")
    save_file({"e": torch.zeros(2)}, tmp_path / "one.safetensors")
    index(tmp_path, dict.fromkeys(TENSORS, "two.safetensors") | {"e": "one.safetensors"})
    assert weight_files(tmp_path) == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    tensors = read_tensors(tmp_path)
    assert {name: entry["file"].name for name, entry in tensors.items()} == {
        **dict.fromkeys(TENSORS, "two.safetensors"), "e": "one.safetensors",
    }  # fmt: skip


WRONG_INDICES = {
    "no JSON object": ([], "has no weight_map"),
    "a missing file": ({"a": "three.safetensors"}, r"names three\.safetensors, which is not there \(1 of 1 files"),
    "a file elsewhere": ({"a": "../model.safetensors"}, "wanted a file beside it"),
    "an absolute path": ({"a": "/etc/passwd"}, "wanted a file beside it"),
    "no name": ({"a": 3}, "wanted a file beside it"),
    "a tensor that its file lacks": ({"a": "two.safetensors", "z": "two.safetensors"}, "holds z, which it does not"),
}


@pytest.mark.parametrize(("weight_map", "message"), WRONG_INDICES.values(), ids=list(WRONG_INDICES))
def test_an_index_that_does_not_fit_its_files_is_refused(weight_map, message, file, tmp_path):
    file.rename(tmp_path / "two.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_a_tensor_in_two_files_is_refused(file, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    file.rename(tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"'.*two\.safetensors' and one\.safetensors both hold a"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", b"\xff\xfe"], ids=repr)
def test_a_config_that_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json' is damaged: it (holds|is no JSON)") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)

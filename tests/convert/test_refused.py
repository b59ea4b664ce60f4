"""Models that are refused by name, each with its reason, and code of a folder's own, which is never run."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.llama_folders import make_folder

from diffattn.cli.main import main
from diffattn.convert.convert import convert, kind_of
from diffattn.errors import UnsupportedError

NEVER = "code of its own"
MOTIF_3 = {"model_type": "Motif", "attention_cls": "gdla", "diff_v2": True, "kv_lora_rank": 512, "num_experts": 384}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "diff_llama": ({"model_type": "diff_llama", "attn_family": "diff_attn"}, f"diff_llama has .* {NEVER}.*never run"),
    "diff_llama as llama": ({"model_type": "llama", "attn_family": "diff_attn"}, "attn_family 'diff_attn', which"),
    "Phi-4-mini-flash": ({"model_type": "phi4flash", "auto_map": {"AutoConfig": "a.B"}}, "phi4flash has Mamba layers"),
    "Motif 3": (MOTIF_3, "this is Motif 3: diff_v2 True"),
    "Motif 3 by its attention": ({"model_type": "motif", "attention_cls": "gdla"}, "Motif 3: attention_cls 'gdla'"),
    "Motif 3 by its experts": ({"model_type": "Motif", "num_experts": 384}, "Motif 3: num_experts 384"),
    "llama with code": ({"model_type": "llama", "auto_map": {"AutoModel": "a.B"}}, f"'llama' with {NEVER} \\(auto_map"),
    "diffllama with code": ({"model_type": "diffllama", "auto_map": {"AutoModel": "a.B"}}, "wanted the diffllama of"),
    "unknown with code": (
        {"model_type": "new", "auto_map": {"AutoModel": "a.B"}},
        f"'new', with {NEVER} .*; wanted one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_by_name_in_one_line(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words) as caught:
        kind_of(config)
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_folder("diffllama", tmp_path / "source")
    (source / "own.py").write_text("open('ran', 'w')\n")
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "made")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "never run" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_code_of_ours_in_our_folder_is_no_reason(tmp_path: Path) -> None:
    source = make_folder("softmax", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.Config"}}))
    assert convert(source, tmp_path / "made", "llama").target == "mistral"

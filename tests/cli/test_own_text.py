"""A person's own text through the verbs: the field of rows, what a folder leaves out, what a tokenizer loses."""

import json
import math
from pathlib import Path

import pytest
from support.needle_model import TEXT, haystack, reader
from support.small_comparison import write_shape
from tokenizers import normalizers

from diffattn.cli.main import main
from diffattn.data.packing import prepare_data
from diffattn.data.tokenizer import fingerprint, train_tokenizer, vocabulary_rows
from diffattn.model.loading import load_tokenizer
from diffattn.train.continued import continue_training
from diffattn.train.own import read_own
from diffattn.train.recipe import Recipe

ROWS = [f"Row {number} is about {word}. " * 9 for number in range(30) for word in ("rain", "a road")]
SMALL = ["--steps", "1", "--context", "16", "--batch-size", "2", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The text's alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    write_shape(Path("."))
    Path("rows.ndjson").write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    """A model whose tokenizer makes all letters small, which is 4% of its text."""
    folder, tokenizer = tmp_path / "lossy", haystack().tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    reader("softmax").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(f"{TEXT}\n<|endoftext|>\n{TEXT} The end.\n", encoding="utf-8")
    return folder


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [
        ["train", "--shape", "small.toml", "--attention", "softmax", *SMALL, "--out", "run"],
        ["compare", "--shape", "small.toml", "--variants", "softmax", "--seeds", "1", *SMALL, "--out", "run"],
        ["scale", "run", "--sizes", "10k", "--variants", "softmax", "--seeds", "1", "--tokens", "100", "--vocab-size",
         "300", "--context", "16", "--out", "run"],
    ],
    ids=lambda verb: verb[0],
)  # fmt: skip
def test_the_field_of_rows_is_named_and_kept(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--text", "rows.ndjson"]) == 2
    assert "wanted a field with text, here: body: name one of them with --field" in errors(capsys)
    assert main([*verb, "--text", "rows.ndjson", "--field", "body"]) == 0
    capsys.readouterr()
    if verb[0] != "scale":
        assert main([verb[0], "--resume", "--out", "run"]) == 0
        capsys.readouterr()
        assert main([verb[0], "--resume", "--out", "run", "--field", "text"]) == 2
        assert "run was started with --field body, now --field text;" in errors(capsys)
        # The text may have moved; it is read by the field that the run has.
        Path("moved").mkdir()
        Path("rows.ndjson").rename("moved/rows.ndjson")
        assert main([verb[0], "--resume", "--out", "run", "--text", "moved/rows.ndjson"]) == 0


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_several_texts_are_kept_with_their_weights(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("\n\f\n".join(ROWS[::2]))
    Path("b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS[1::2]))
    kind = ["--attention", "softmax"] if verb == "train" else ["--variants", "softmax", "--seeds", "1"]
    texts = ["--text", "a.txt:0.7", "*.jsonl:0.3"]
    assert main([verb, "--shape", "small.toml", *kind, *SMALL, *texts, "--out", "run"]) == 0
    kept = json.loads(Path("run/config.json").read_text())["options"]["text"]
    assert kept == [f"{Path.cwd()}/a.txt:0.7", f"{Path.cwd()}/*.jsonl:0.3"]
    resume = [verb, "--resume", "--out", "run"]
    assert main(resume) == 0
    assert main([*resume, *texts]) == 0
    capsys.readouterr()
    for others in (["a.txt:0.3", "*.jsonl:0.7"], ["a.txt", "*.jsonl"], ["a.txt"]):
        assert main([*resume, "--text", *others]) == 2
        assert f"*.jsonl:0.3', now --text {others[0]}" in errors(capsys)
    Path("moved").mkdir()
    for name in ("a.txt", "b.jsonl"):
        Path(name).rename(f"moved/{name}")
    assert main([*resume, "--text", "moved/a.txt:0.7", "moved/b.jsonl:0.3"]) == 0


def test_a_tokenizer_that_is_given_is_used_and_kept(
    tmp_path: Path, lossy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--shape", "small.toml", "--attention", "softmax", *SMALL, "--text", "text.txt", "--out", "run"]
    assert main([*train, "--tokenizer", "lossy"]) == 2
    rows = vocabulary_rows(load_tokenizer(lossy))
    assert f"write a shape with vocab_size = {rows} into a TOML file for --shape" in errors(capsys)
    small = train_tokenizer([TEXT], 280)
    small.save_pretrained(tmp_path / "mine")
    assert main([*train, "--tokenizer", "mine"]) == 0
    assert read_own(Path("run")).tokenizer == tmp_path / "mine"
    assert load_tokenizer(tmp_path / "run" / "model").get_vocab() == small.get_vocab()
    assert json.loads(Path("run/config.json").read_text())["data"]["tokenizer"] == fingerprint(small)
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert main(["train", "--resume", "--out", "run", "--tokenizer", "mine"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "run", "--tokenizer", "lossy"]) == 2
    assert "--tokenizer" in errors(capsys)
    assert main(["train", "--from", "run/model", "--tokenizer", "mine", "--out", "other"]) == 2
    assert "--tokenizer mine beside --from run/model" in errors(capsys)
    assert main([*train[:-1], "third", "--tokenizer", "nowhere"]) == 2
    assert not Path("third").exists()


def test_a_chat_template_writes_conversations_and_goes_into_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"
    Path("chat.jinja").write_text(template)
    said = [[{"role": "user", "content": row}, {"role": "assistant", "content": "Yes."}] for row in ROWS]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in said))
    train = ["train", "--shape", "small.toml", "--attention", "softmax", *SMALL, "--text", "chats.jsonl"]
    assert main([*train, "--chat-template", "chat.jinja", "--out", "run"]) == 0
    assert load_tokenizer(Path("run/model")).chat_template == template
    assert Path("run/model/chat_template.jinja").read_text() == template
    # The run keeps the template itself.
    Path("chat.jinja").rename("moved.jinja")
    resume = ["train", "--resume", "--out", "run"]
    assert main(resume) == 0
    assert main([*resume, "--chat-template", "moved.jinja"]) == 0
    capsys.readouterr()
    Path("other.jinja").write_text(template.upper().replace("<{{ MESSAGE.ROLE }}> {{ MESSAGE.CONTENT }}", "?"))
    assert main([*resume, "--chat-template", "other.jinja"]) == 2
    assert "'other.jinja' fails (" in errors(capsys)
    Path("other.jinja").write_text(template.replace("<", "Then says "))
    assert main([*resume, "--chat-template", "other.jinja"]) == 2
    assert "run was started with --chat-template FILE, now --chat-template other.jinja;" in errors(capsys)
    assert main([*train, "--chat-template", "absent.jinja", "--out", "second"]) == 2
    assert not Path("second").exists()
    further = ["train", "--from", "run/model", *SMALL, "--text", "chats.jsonl", "--chat-template", "other.jinja"]
    assert main([*further, "--out", "third"]) == 0
    assert load_tokenizer(Path("third/model")).chat_template == template.replace("<", "Then says ")
    tokens = [json.loads(Path(run, "config.json").read_text())["data"]["tokens"] for run in ("run", "third")]
    assert tokens[0] != tokens[1]


def test_a_run_that_kept_one_text_as_a_name_goes_on() -> None:
    """As versions did that knew one text."""
    Path("a.txt").write_text("\n\f\n".join(ROWS))
    command = ["train", "--shape", "small.toml", "--attention", "softmax", *SMALL, "--text", "a.txt", "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.train.own.lasting", lambda text: f"{Path.cwd()}/{text[0]}")
        assert main(command) == 0
    assert json.loads(Path("run/config.json").read_text())["options"]["text"].endswith("a.txt")
    assert read_own(Path("run")).text == (f"{Path.cwd()}/a.txt",)
    assert main(["train", "--resume", "--out", "run", "--text", "a.txt"]) == 0
    assert main(["train", "--resume", "--out", "run", "--text", "rows.ndjson", "--field", "body"]) == 2


def test_what_is_left_out_of_a_folder_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    Path("texts/A.TXT").write_text("\n\f\n".join(ROWS))
    Path("texts/.hidden").write_text("hidden")
    command = ["train", "--shape", "small.toml", "--attention", "softmax", *SMALL, "--out", "run", "--text", "texts"]
    assert main(command) == 0
    assert "texts: 1 file read; left out: hidden: 1\n" in errors(capsys)


def test_a_new_models_tokenizer_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--shape", "small.toml", "--lossy-tokenizer", "--out", "run"]) == 2
    assert "--lossy-tokenizer without --from or --tokenizer" in errors(capsys)
    assert not Path("run").exists()


def test_training_a_model_whose_tokenizer_loses_text(lossy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--from", str(lossy), *SMALL, "--text", "text.txt", "--out", "run"]
    assert main(command) == 2
    line = errors(capsys)
    assert "loses text" in line
    assert "--lossy-tokenizer" in line
    assert not Path("run").exists()
    assert main([*command, "--lossy-tokenizer"]) == 0
    assert "loses text" in errors(capsys)
    assert main(["train", "--resume", "--out", "run"]) == 0


def test_bits_per_byte_of_such_a_model_are_of_the_texts_own_bytes(lossy: Path) -> None:
    recipe = Recipe(steps=1, batch_size=2, dtype="float32", device="cpu")
    options = {"text": "text.txt", "context": 16, "lossy_tokenizer": True}
    result = continue_training(lossy, recipe, "run", **options)
    tokenizer = haystack().tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    data = prepare_data("text.txt", tokenizer=tokenizer, context=16, lossy_tokenizer=True)
    own = data.facts["bytes"]["validation"] / (len(data.validation.tokens) - 1)
    assert result.bits_per_byte == pytest.approx(result.val_loss / math.log(2) / own, rel=0.03)


@pytest.mark.parametrize("study", ["outliers", "low_bit"])
def test_measuring_a_model_whose_tokenizer_loses_text(
    study: str, lossy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--tokens", "200"] if study == "outliers" else ["--samples", "2", "--bits", "16"]
    command = ["eval", study, str(lossy), "--text", "text.txt", "--context", "40", *few]
    assert main(command) == 2
    assert "--lossy-tokenizer" in errors(capsys)
    assert main([*command, "--lossy-tokenizer"]) == 0
    assert "loses text" in errors(capsys)


def test_measuring_on_rows(lossy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "outliers", str(lossy), "--lossy-tokenizer", "--text", "rows.ndjson", "--context", "40",
               "--tokens", "20"]  # fmt: skip
    assert main(command) == 2
    assert "--field" in errors(capsys)
    assert main([*command, "--field", "body"]) == 0


def test_text_in_a_file_whose_name_is_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    Path(name).write_text("\n\f\n".join(ROWS))
    for verb in (["train", "--attention", "softmax"], ["compare", "--variants", "softmax", "--seeds", "1"]):
        out = f"run-{verb[0]}"
        assert main([*verb, "--shape", "small.toml", *SMALL, "--text", name, "--out", out, "--json"]) == 0
        json.loads(capsys.readouterr().out)
        assert main([verb[0], "--resume", "--out", out]) == 0
        capsys.readouterr()

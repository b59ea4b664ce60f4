import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from support.small_folders import small_folder

from diffattn.cli.main import main
from diffattn.generate.decoding import Decoding
from diffattn.generate.generation import generate
from diffattn.model.trained import Trained, write_trained

PROMPT = "lower löwe"
NINE = ["--max-new-tokens", "9", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(folder):
    return generate(folder, PROMPT, Decoding(max_new_tokens=9), device="cpu").text


def test_the_text_is_on_stdout_and_the_speed_on_stderr(folder, text, capsys):
    assert main(["generate", str(folder), PROMPT, *NINE]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert " + 9 tokens; loaded in " in err
    assert " tokens/s (" in err


def test_options_reach_the_model(folder, capsys):
    options = ["--temperature", "0.9", "--top-p", "0.8", "--top-k", "40", "--seed", "3", "--dtype", "bfloat16",
               "--attn-implementation", "sdpa", "--cache", "static"]  # fmt: skip
    assert main(["generate", str(folder), PROMPT, *NINE, *options]) == 0
    decoding = Decoding(max_new_tokens=9, temperature=0.9, top_p=0.8, top_k=40, seed=3, cache="static")
    expected = generate(folder, PROMPT, decoding, dtype="bfloat16", device="cpu", attn_implementation="sdpa")
    assert capsys.readouterr().out == expected.text + "\n"
    assert main(["generate", str(folder), PROMPT, *NINE, "--num-beams", "3", "--json"]) == 0
    beams = generate(folder, PROMPT, Decoding(max_new_tokens=9, num_beams=3), device="cpu")
    assert json.loads(capsys.readouterr().out)["text"] == beams.text
    assert main(["generate", str(folder), PROMPT, *NINE, "--assistant", str(folder)]) == 0


def test_a_temperature_next_to_nothing_is_greedy(folder, text, capsys):
    assert main(["generate", str(folder), PROMPT, *NINE, "--temperature", "1e-40"]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_json_is_one_object_and_a_dash_reads_stdin(folder, text, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode())))
    assert main(["generate", str(folder), "-", *NINE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["text"], found["new_tokens"]) == (PROMPT, text, 9)
    for name in ("load_seconds", "first_token_seconds", "seconds", "tokens_per_second", "prompt_tokens"):
        assert found[name] > 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"low\xff")))
    assert main(["generate", str(folder), "-"]) == 2
    assert (
        capsys.readouterr().err
        == "diffattn: byte 3 of stdin, which is not UTF-8; wanted a prompt in UTF-8: convert it\n"
    )


MISTAKES = {
    "no folder": (["absent", PROMPT], "there is no folder 'absent'; wanted the folder of a checkpoint"),
    "no prompt": (["FOLDER", ""], "the prompt is empty"),
    "cold": (["FOLDER", PROMPT, "--temperature", "-1"], "temperature is -1.0"),
    "not a number": (["FOLDER", PROMPT, "--temperature", "nan"], "wanted a finite number"),
    "no float32": (["FOLDER", PROMPT, "--temperature", "1e300"], "temperature is 1e+300"),
    "a seed beyond the generator's": (
        ["FOLDER", PROMPT, "--seed", "9" * 30],
        "a number up to 9,223,372,036,854,775,807",
    ),
    "a penalty of nothing": (["FOLDER", PROMPT, "--repetition-penalty", "0"], "wanted a number from 0.01 to 100"),
    "too long": (["FOLDER", PROMPT, "--max-new-tokens", "500"], "take max_new_tokens of at most"),
    "no template": (["FOLDER", PROMPT, "--chat"], "has no chat template"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_exit_status_two(arguments, message, folder, capsys):
    assert main(["generate", *(str(folder) if word == "FOLDER" else word for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_reader_who_stops_reading_ends_it_without_a_complaint(folder):
    read, write = os.pipe()
    command = [sys.executable, "-m", "diffattn", "generate", str(folder), PROMPT, "--max-new-tokens", "60"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    assert "Broken" not in said
    assert process.returncode == 0


def test_what_the_model_is_stands_beside_its_text(tmp_path, capsys):
    folder = small_folder(tmp_path)
    assert main(["generate", str(folder), PROMPT, *NINE]) == 0
    # Of weights from elsewhere nothing is known, and nothing is said.
    assert "this model" not in capsys.readouterr().err
    little = Trained(attention="diff_v1", parameters=5_000, vocab_size=300, steps=30, tokens=1_920, val_loss=5.2,
                     continued=False)  # fmt: skip
    write_trained(folder, little)
    assert main(["generate", str(folder), PROMPT, *NINE]) == 0
    out, err = capsys.readouterr()
    assert "trained" not in out
    model, note = err.splitlines()[-2:]
    assert model == (
        "this model: diff_v1, 5 k parameters, trained in 30 steps on 1,920 tokens; held-out loss 5.20 nats per token "
        "(guessing among 300 tokens costs 5.70)"
    )
    assert note.startswith("note: so little training makes text that repeats itself or has no sense")
    assert "no fault of the program" in note
    write_trained(folder, replace(little, tokens=10**9))
    assert main(["generate", str(folder), PROMPT, *NINE, "--json"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("this model: ")
    (folder / "training.json").write_text("[]")
    assert main(["generate", str(folder), PROMPT, *NINE]) == 2
    assert capsys.readouterr().err.count("\n") == 1

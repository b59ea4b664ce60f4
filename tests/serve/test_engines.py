import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from support.served import CONTEXT, write_model
from support.small_folders import small_folder

from diffattn.cli.main import main
from diffattn.errors import UnsupportedError
from diffattn.model.trained import Trained, write_trained
from diffattn.serve import engines, vllm_engine
from diffattn.serve.hosts import Hosts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engines") / "model", "diff_v1")


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DIFFATTN_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "model"))


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str, plugin: bool = True) -> None:
    known = {"vllm", "fastapi", "openai", "uvicorn"}
    find = importlib.util.find_spec
    spec = find("diffattn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (spec if name in packages else None) if name in known else find(name)
    )
    point = importlib.metadata.EntryPoint("diffattn", "diffattn.serve.vllm_plugin:register", engines.PLUGIN_GROUP)
    monkeypatch.setattr(engines, "entry_points", lambda group: [point] if plugin else [])


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Exit status 2 and one line on stderr, before anything has started."""
    assert main(["serve", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("diffattn: ")
    assert printed.err.count("\n") == 1, printed.err
    for word in words:
        assert word in printed.err


def test_the_best_engine_that_is_installed_is_taken(monkeypatch):
    installed(monkeypatch, "vllm", "fastapi", "openai", "uvicorn")
    assert engines.choose() == "vllm"
    assert engines.choose("transformers") == "transformers"
    installed(monkeypatch, "fastapi", "openai", "uvicorn")
    assert engines.choose() == "transformers"
    # vLLM cannot find the model without the plugin.
    installed(monkeypatch, "vllm", "fastapi", "openai", "uvicorn", plugin=False)
    assert engines.choose() == "transformers"


def test_an_engine_that_is_named_and_not_there_says_how_to_install_it(folder, capsys, monkeypatch):
    installed(monkeypatch, "fastapi", "openai")
    fails([str(folder), "--engine", "vllm"], capsys, "vllm is not installed", "pip install vllm")
    fails(
        [str(folder), "--engine", "transformers"], capsys, "uvicorn is not installed", "pip install 'diffattn[serve]'"
    )
    fails([str(folder)], capsys, "no engine is installed", "pip install 'diffattn[serve]'")
    installed(monkeypatch, "vllm", plugin=False)
    fails([str(folder), "--engine", "vllm"], capsys, "plugin")
    with pytest.raises(UnsupportedError):
        engines.choose("vllm")
    fails([str(folder), "--engine", "tgi"], capsys, "tgi", "vllm", "transformers")


def without(name: str):
    return lambda folder: (folder / name).unlink()


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)


def of_type(kind: str):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["there is no folder"]),
        (without("config.json"), ["holds no config.json"]),
        (without("model.safetensors"), ["holds no model.safetensors"]),
        (without("tokenizer.json"), ["holds no tokenizer"]),
        (as_pickle, ["pickle", "never loaded"]),
        (cut_off, ["damaged"]),
        (of_type("diffllama"), ["'diffllama'", "diffattn convert"]),
        (of_type("llama"), ["'llama'", "vllm serve", "transformers serve"]),
        (of_type("gpt9"), ["'gpt9'"]),
    ],
)
def test_a_folder_that_cannot_be_served_is_one_line(folder, capsys, damage, words):
    damage(folder)
    fails([str(folder), "--port", "0"], capsys, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", ""], ["API key is empty"]),
        (["--api-key", "two words"], ["API key"]),
        (["--api-key", "schlüssel"], ["API key"]),
        (["--model-name", " "], ["model_name is empty"]),
        (["--max-context", "1"], ["max_context is 1"]),
        (["--max-context", str(CONTEXT + 1)], [f"max_context is {CONTEXT + 1}", f"{CONTEXT:,}"]),
        (["--allow-host", "http://a.org"], ["allow_host is 'http://a.org'", "without http://"]),
        (["--port", "65536"], ["port is 65536"]),
        (["--host", "192.0.2.1", "--port", "0"], ["192.0.2.1", "--host"]),
        (["--host", "no such host", "--port", "0"], ["no such host", "--host"]),
        (["--device", "tpu"], ["tpu"]),
        (["--dtype", "int3"], ["int3"]),
    ],
)
def test_an_option_that_cannot_work_is_one_line(folder, capsys, arguments, words):
    fails([str(folder), *arguments], capsys, *words)


def test_an_empty_key_in_the_environment_is_no_key_at_all_by_mistake(folder, capsys, monkeypatch):
    monkeypatch.setenv("DIFFATTN_API_KEY", "")
    fails([str(folder), "--port", "0"], capsys, "API key is empty")


def test_a_port_that_is_taken_is_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails([str(folder), "--port", str(port)], capsys, f"port {port}", "in use", "--port")


def test_a_tokenizer_of_another_model_is_one_line(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "softmax", vocab_size=300)
    # A progress bar of saving.
    capsys.readouterr()
    fails([str(folder), "--engine", "transformers", "--port", "0"], capsys, "tokenizer", "300")


def test_names_and_context(folder):
    chosen, names, listener, context = engines.prepare("model", port=0, max_context=99)
    with listener:
        assert (chosen, names, context) == ("transformers", ("model", str(folder)), 99)
        assert listener.getsockname()[0] == "127.0.0.1"
    chosen, names, listener, context = engines.prepare(folder, port=0, model_name="mine")
    with listener:
        assert (names, context) == (("mine", str(folder)), CONTEXT)


def test_who_can_reach_an_open_server_is_said(folder, monkeypatch):
    from diffattn.serve import transformers_engine

    monkeypatch.setattr(transformers_engine, "serve", lambda *a, on_ready, **k: on_ready("cpu, float32"))
    notes: list[str] = []
    for host, key, warned in (("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "key", False)):
        notes.clear()
        engines.serve(folder, "transformers", host=host, port=0, api_key=key, on_note=notes.append)
        assert any("--api-key" in note for note in notes) == warned
        assert notes[-1].startswith("serving 'model' with transformers ")
        assert "(cpu, float32)" in notes[-1]
        assert f"http://{host}:" in notes[-1]


def test_the_start_up_line_says_what_the_model_is(tmp_path, monkeypatch):
    from diffattn.serve import transformers_engine

    monkeypatch.setattr(transformers_engine, "serve", lambda *a, on_ready, **k: on_ready("cpu, float32"))
    folder, notes = small_folder(tmp_path / "model"), []
    engines.serve(folder, "transformers", port=0, on_note=notes.append)
    assert notes[-1].endswith("/v1")
    write_trained(folder, Trained(attention="diff_v1", parameters=5_000, vocab_size=300, steps=30, tokens=1_920,
                                  val_loss=5.2, continued=False))  # fmt: skip
    stages: list = []
    engines.serve(folder, "transformers", port=0, on_note=notes.append, on_stage=stages.append)
    assert "/v1; diff_v1, 5 k parameters, trained in 30 steps on 1,920 tokens; held-out loss 5.20" in notes[-1]
    assert [stage.name for stage in stages] == ["importing the server", "loading the model"]


def test_vllm_is_started_with_what_was_asked_and_without_the_key_in_its_arguments(folder, monkeypatch):
    started: list = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_API_KEY", "old")
    installed(monkeypatch, "vllm")
    notes: list[str] = []
    engines.serve(folder, port=0, api_key="secret", model_name="mine", max_context=64,
                  allow_host=["models.example.org"], on_note=notes.append)  # fmt: skip
    (program, command, environment) = started[0]
    assert program == command[0] == sys.executable
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    options = " ".join(command)
    for option in (f"--model {folder}", f"--served-model-name mine {folder}", "--host 127.0.0.1", "--max-model-len 64",
                   "--middleware diffattn.serve.vllm_engine.Guard"):  # fmt: skip
        assert option in options
    # vLLM's own choice would round the weights.
    assert "--dtype float32" in options
    assert "secret" not in options
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment["VLLM_PLUGINS"] == "other,diffattn"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    # vLLM makes its middleware in its own process, from the environment.
    monkeypatch.setenv(vllm_engine.GUARD, environment[vllm_engine.GUARD])
    assert vllm_engine.Guard(None)._hosts == Hosts.of("127.0.0.1", "127.0.0.1", ["models.example.org"])
    assert notes[-1].startswith("starting vllm ")
    # The port is free for vLLM.
    port = int(command[command.index("--port") + 1])
    socket.create_server(("127.0.0.1", port)).close()
    assert "VLLM_API_KEY" not in vllm_engine.environment(None, json.loads(environment[vllm_engine.GUARD]))


def test_the_saved_dtype_is_found_where_config_json_does_not_name_it(folder):
    assert vllm_engine.saved_dtype(folder) == "float32"
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert vllm_engine.saved_dtype(folder) == "float32"
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert vllm_engine.saved_dtype(folder) == "bfloat16"


@pytest.mark.parametrize(("host", "loopback"), [("127.8.9.1", True), ("::1", True), ("::", False), ("example", False)])
def test_loopback(host, loopback):
    assert engines.is_loopback(host) == loopback

"""Commands of others on plain folders, in processes that import no diffattn: each variant beside Llama."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.ecosystem import LLAMA, MODELS, SHAPE, small, tool, with_entry_points
from support.small_folders import small_tokenizer
from transformers import PreTrainedModel

from diffattn.model.loading import load

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

# What the programs `transformers` and `lm_eval` run; the scripts lie in another environment than the tools.
TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers"]
LM_EVAL = [sys.executable, "-m", "lm_eval"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
TASK = """task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["low", "wide"]
doc_to_target: 0
"""
# Never names diffattn. What it prints last are the log-likelihoods of both choices, by model.
EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
found = {}
for folder in sys.argv[2:]:
    done = simple_evaluate(
        "hf", model_args=f"pretrained={folder}", tasks=["tiny"], device="cpu", log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=sys.argv[1]),
    )
    found[folder] = [resp[0] for sample in done["samples"]["tiny"] for resp in sample["filtered_resps"]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain folder of each model, with a tokenizer and a chat template."""
    made = {}
    for kind in MODELS:
        made[kind] = tmp_path_factory.mktemp("folders") / kind
        small(kind, pad_token_id=0).save_pretrained(made[kind])
        tokenizer = small_tokenizer(SHAPE.vocab_size)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return with_entry_points(tmp_path_factory.mktemp("installed"))


def answer(model: PreTrainedModel, tokenizer, said: str, tokens: int) -> str:
    """The greedy answer of ``generate``."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``transformers serve``, which loads the folder that a request names."""
    tool("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*TRANSFORMERS, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=environment, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_serve_answers_as_generate(kind: str, folders, server: str) -> None:
    body = {
        "model": str(folders[kind]), "max_tokens": 8, "temperature": 0,
        "messages": [{"role": "user", "content": "new lower"}],
    }  # fmt: skip
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["message"]["content"]
    assert said == answer(*load(folders[kind]), "new lower", 8)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_chat_shows_an_answer(kind: str, folders, server: str, environment: dict[str, str]) -> None:
    # Its client counts this machine's server as the network.
    online = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"} | {"COLUMNS": "400"}
    done = subprocess.run(
        [*TRANSFORMERS, "chat", str(folders[kind]), server, "max_new_tokens=8", "do_sample=False"],
        input="new lower\nn\n!exit\n!exit\n", env=online, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"<{folders[kind]}>:" in done.stdout
    # It was cut off after eight tokens, and asks whether to go on.
    assert "reaching the token limit" in done.stdout, done.stdout
    for word in re.findall(r"[a-z]+", answer(*load(folders[kind]), "new lower", 8)):
        assert word in done.stdout


def test_lm_eval_measures_plain_folders(folders, environment: dict[str, str], tmp_path: Path) -> None:
    tool("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text('{"q": "new lower"}\n{"q": "low lowest"}\n')
    (tasks / "tiny.yaml").write_text(TASK.format(rows=tasks / "rows.jsonl"))
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    done = subprocess.run(
        [sys.executable, script, tasks, *folders.values()], capture_output=True, text=True,
        env=environment | {"HF_HOME": str(tmp_path / "cache")}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, folder in folders.items():
        model, tokenizer = load(folder)
        wanted = []
        for question in ("new lower", "low lowest"):
            for choice in (" low", " wide"):
                texts = (question, question + choice)
                before, both = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
                with torch.no_grad():
                    rows = model(both).logits[0].log_softmax(-1)
                wanted.append(sum(float(rows[at - 1, both[0, at]]) for at in range(before.shape[1], both.shape[1])))
        assert [each[0] if isinstance(each, list) else each for each in found[str(folder)]] == pytest.approx(
            wanted, abs=1e-3
        ), kind


def test_the_command_of_lm_eval_prints_its_table(folders, environment: dict[str, str], tmp_path: Path) -> None:
    tool("lm_eval")
    (tmp_path / "rows.jsonl").write_text('{"q": "new lower"}\n')
    (tmp_path / "tiny.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    for kind in (LLAMA, "diff_v1"):
        done = subprocess.run(
            [*LM_EVAL, "run", "--model", "hf", "--model_args", f"pretrained={folders[kind]}", "--tasks", "tiny",
             "--include_path", tmp_path, "--device", "cpu"],
            capture_output=True, text=True, env=environment | {"HF_HOME": str(tmp_path / "cache")}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "|tiny" in done.stdout


def test_without_the_entry_point_a_plain_folder_is_not_known(folders, environment: dict[str, str]) -> None:
    """The switch of PyTorch that docs/ecosystem.md names."""
    program = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, folders["diff_v1"]], capture_output=True, text=True,
        env=environment | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "does not recognize this architecture" in done.stderr

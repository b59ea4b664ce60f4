"""A tiny model folder with a tokenizer, and ``diffattn serve`` over it in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from diffattn.data.tokenizer import train_tokenizer
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import ModelShape

CONTEXT = 4096
SENTENCES = (
    "The boat left the harbour before the sun was up.",
    "Nobody had seen the old man since the end of winter.",
    "She counted the coins twice and closed the drawer.",
    "Rain fell on the roofs, on the road and on the river.",
    "They asked for bread, and he gave them bread and wine.",
    "In the evening the letters were read aloud in the kitchen.",
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
KEY = "a-key"


def write_model(folder: Path, attention: str, *, template: bool = True, context: int = CONTEXT, **config: Any) -> Path:
    """A model whose next token depends on the whole text: its scores are of the order of 1."""
    tokenizer = train_tokenizer(SENTENCES, 320)
    if template:
        tokenizer.chat_template = TEMPLATE
    shape = ModelShape(
        hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_size=64,
        vocab_size=len(tokenizer), max_position_embeddings=context,
    )  # fmt: skip
    torch.manual_seed(0)
    # Tied, a wide embedding would make every model repeat its last token.
    fields = {"initializer_range": 0.3, "tie_word_embeddings": False, "eos_token_id": tokenizer.eos_token_id} | config
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(shape, attention, **fields)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Served:
    process: subprocess.Popen[str]
    folder: Path
    log: Path
    address: str

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.address}/health", timeout=10) as response:
            return json.load(response)

    def becomes_free(self, seconds: float) -> bool:
        """Whether nothing is being answered any more, after at most so long."""
        deadline = time.monotonic() + seconds
        while (requests := self.health()["requests"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return requests == 0

    def errors(self) -> str:
        return self.log.read_text(encoding="utf-8")


@contextlib.contextmanager
def running(folder: Path, *arguments: str, key: str | None = KEY, seconds: float = 90) -> Iterator[Served]:
    """``diffattn serve FOLDER --port 0 ...`` until the end of the block, where it is told to stop."""
    log = folder.parent / f"{folder.name}.log"
    environment = {name: value for name, value in os.environ.items() if name != "DIFFATTN_API_KEY"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if key is None else {"DIFFATTN_API_KEY": key})
    command = [sys.executable, "-m", "diffattn", "serve", str(folder), "--port", "0", *arguments]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stderr=errors, text=True, env=environment)
    try:
        deadline = time.monotonic() + seconds
        while (found := re.search(r"serving .* on (http://\S+)/v1", log.read_text(encoding="utf-8"))) is None:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield Served(process, folder, log, found[1])
    finally:
        process.terminate()
        process.wait(timeout=30)

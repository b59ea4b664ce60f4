"""Makes the page of ``diffattn demo``: one or two models, the text that they begin with, and all that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffattn.demo.options import DEMO_BITS, DemoOptions
from diffattn.demo.page import render_demo
from diffattn.demo.panel import panel
from diffattn.demo.prompts import answer_tokens, ready_prompts
from diffattn.demo.runtime import PACKAGES, runtime
from diffattn.demo.subject import best_head, check_models, facts, graph
from diffattn.demo.tokenizer import check_same, page_tokenizer
from diffattn.errors import ConfigError
from diffattn.export.run import require
from diffattn.model.loading import load, positions_of
from diffattn.probes.lens import names_of
from diffattn.progress import OnStage, Stage, unseen

# What the tokenizer of the page has to cut as the library's does, or else the page says so.
CHECKED_TEXT = "Don't 🦁 é e\u0301 café 12345\n\n  <|endoftext|>日本語 ﬁ\u00a0\u200bx" + " " * 9 + "aa" * 40


@dataclass(frozen=True)
class Demo:
    """A page, and what is in it."""

    page: bytes
    """The content of the file."""
    models: list[dict[str, Any]]
    """Facts of each model: name, attention, layers, heads, parameters, bits, bytes of weights, file and cache."""

    def to_json(self) -> dict[str, object]:
        """Returns the facts, and the bytes of the page."""
        return {"bytes": len(self.page), "models": self.models}


def build_demo(
    folders: Sequence[str | Path],
    *,
    bits: int = 8,
    text: str | None = DemoOptions.text,
    answer: str | None = DemoOptions.answer,
    packages: str | Path | None = DemoOptions.packages,
    command: str = "diffattn.build_demo(...)",
    on_stage: OnStage = unseen,
) -> Demo:
    """Makes one file in which models run: no server and no network are needed to open it.

    Args:
        folders: one checkpoint of ours, or two with one tokenizer, such as a DIFF model and its softmax twin.
        bits: of each weight: 8, 4, or 32 for exact floats.
        text: the text that the page begins with. Default: one that hides a number among other sentences.
        answer: the part of the text that its end asks for.
        packages: a folder with the archives of npm's packages. Default: npm fetches them once.
        command: the command that makes the page, to be named in it.
        on_stage: called with what is being done.

    Raises:
        ConfigError: no model or more than two, other bits, too many bytes for a page, or a text that does not fit.
        UnsupportedError: a model or a tokenizer that a page cannot run, or a missing program.
        DataError: models with different tokenizers, an answer that is not in the text, or other archives.
        CheckpointError: a folder that holds no whole checkpoint.
    """
    if not 1 <= len(folders) <= 2:
        raise ConfigError(f"{len(folders)} models given", "one, or two to be seen beside each other", "name fewer")
    if bits not in DEMO_BITS:
        raise ConfigError(f"bits is {bits}", f"one of {', '.join(map(str, DEMO_BITS))}", "leave it out for 8")
    check_models(folders, bits)
    blobs = page_tokenizer(folders[0])
    check_same(folders)
    require("onnx", "onnxscript", "onnxruntime")
    loaded = []
    for folder in folders:
        on_stage(Stage(f"loading {folder}"))
        loaded.append(load(folder, "float32", "cpu"))
    tokenizer = loaded[0][1]
    contexts = [positions_of(model.config) for model, _ in loaded]
    context = min(positions for positions in contexts if positions is not None)
    # Behind a text there is room for what is written.
    prompts = ready_prompts(text, answer, tokenizer, context - min(64, context // 4))
    asking = next((prompt for prompt in prompts if prompt.answer is not None), prompts[0])
    ids = tokenizer(asking.text)["input_ids"]
    heads = [{"layer": 0, "head": 0}] * len(folders)
    if asking.answer is not None:
        on_stage(Stage("looking for the heads that show it best"))
        span = answer_tokens(asking.text, asking.answer, tokenizer)
        heads = [best_head(model, ids, span) for model, _ in loaded]
    models = [facts(model, ids, tokenizer.eos_token_id) for model, _ in loaded]
    del loaded
    found = runtime(None if packages is None else Path(packages), on_stage)
    names = names_of(folders)
    for index, (folder, model) in enumerate(zip(folders, models, strict=True)):
        blob = f"model-{index}"
        blobs[blob], sizes = graph(folder, bits, on_stage)
        model |= {"name": names[index], "blob": blob} | sizes
    on_stage(Stage("packing the page"))
    shown = [{"name": each.name, "version": each.version, "licence": each.licence} for each in PACKAGES]
    data = {
        "models": models,
        "prompts": [asdict(prompt) | {"heads": heads} for prompt in prompts],
        "plan": panel(),
        "context": context,
        "check": {"text": CHECKED_TEXT, "ids": tokenizer(CHECKED_TEXT)["input_ids"]},
        "packages": [each | {"blob": f"licence-{index}"} for index, each in enumerate(shown)],
        "command": command,
    }
    licences = {f"licence-{index}": text.encode() for index, text in enumerate(found.licences.values())}
    return Demo(render_demo(data, blobs | dict(found.files) | licences), models)

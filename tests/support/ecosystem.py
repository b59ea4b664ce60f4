"""The models and the tools of the tests of docs/ecosystem.md: each model of ours beside a Llama of the same sizes."""

import importlib
import importlib.util
import os
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.small_models import small_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from diffattn.plan.shape import ModelShape
from diffattn.variants import ATTENTIONS

LLAMA = "llama"
MODELS = (LLAMA, *ATTENTIONS)
# bitsandbytes wants blocks of 64 numbers, and on processors with AVX512-BF16 a multiple of 32 rows in every matrix.
SHAPE = ModelShape(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    vocab_size=300,
    max_position_embeddings=128,
)


def tool(name: str) -> ModuleType:
    """The module of a tool; skips the test, with the reason, where the tool is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed; make test-full installs it in .venv-tools")
    return importlib.import_module(name)


def small(kind: str, *, seed: int = 0, **config) -> PreTrainedModel:
    """A Llama or one of our variants; all have the sizes of :data:`SHAPE`."""
    if kind != LLAMA:
        return small_model(kind, shape=SHAPE, seed=seed, **config)
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE.hidden_size, num_hidden_layers=SHAPE.num_layers, num_attention_heads=SHAPE.num_heads,
            num_key_value_heads=SHAPE.num_kv_heads, intermediate_size=SHAPE.intermediate_size,
            head_dim=SHAPE.head_dim, vocab_size=SHAPE.vocab_size, max_position_embeddings=SHAPE.max_position_embeddings,
            tie_word_embeddings=SHAPE.tie_word_embeddings, initializer_range=0.15, **config,
        )
    ).eval()  # fmt: skip


def ids(*, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, SHAPE.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(ids()).logits


def with_entry_points(folder: Path) -> dict[str, str]:
    """The environment of a process in which diffattn is installed with the entry points of pyproject.toml."""
    root = Path(__file__).parents[2]
    groups = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    installed = folder / "diffattn_entry_points-1.dist-info"
    installed.mkdir(parents=True)
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{n} = {at}" for n, at in names.items()))
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: diffattn-entry-points\nVersion: 1\n")
    path = os.pathsep.join([str(root / "src"), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

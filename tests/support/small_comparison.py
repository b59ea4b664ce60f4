"""A comparison that takes seconds: a shape of 20 thousand parameters and text of a few kilobytes."""

import random
from pathlib import Path

SHAPE = """
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 64
vocab_size = 300
max_position_embeddings = 32
"""


def write_shape(folder: Path, **changes: int) -> str:
    file = folder / "small.toml"
    lines = [line for line in SHAPE.split("\n") if line.split(" ")[0] not in changes]
    file.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in changes.items())]))
    return str(file)


def write_text(folder: Path, *, documents: int = 40) -> str:
    """Documents of sentences that repeat a few words, so that a small model learns something in a few steps."""
    draw = random.Random(7)
    words = ["the", "state", "of", "union", "is", "strong", "and", "our", "people", "free", "to", "work", "in"]
    target = folder / "text"
    target.mkdir()
    for index in range(documents):
        sentences = (" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(25))
        (target / f"{index:02}.txt").write_text(" ".join(sentences))
    return str(target)

"""Makes a public Llama differential, with the same function, and trains it on in its own tokens.

python examples/llama_to_diff.py SmolLM2-135M runs/smollm2 --steps 200
"""

import argparse
from pathlib import Path

import torch

from diffattn import Recipe, continue_training, convert_checkpoint, load


def main(source: str, out: str, text: str, steps: int) -> float:
    converted = Path(out) / "v2"
    print(convert_checkpoint(source, converted, "diff_v2").exact)
    before, tokenizer = load(source)
    after, _ = load(converted)
    ids = tokenizer("We the people of the United States", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = (before(ids).logits - after(ids).logits).abs().max().item()
    print(f"largest difference of the logits before training: {difference:.1e}")
    result = continue_training(converted, Recipe(steps=steps, learning_rate=1e-4), Path(out) / "trained", text=text)
    print(f"held-out loss after {steps} steps: {result.val_loss:.4f} nats per token; model: {result.model_folder}")
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of a Llama, Mistral, Qwen2 or Qwen3 model with its tokenizer")
    parser.add_argument("out", help="folder to write both models into")
    parser.add_argument("--text", default="sotu", help="a file, a folder, or a data set's id")
    parser.add_argument("--steps", type=int, default=100, help="steps to train on")
    given = parser.parse_args()
    main(given.source, given.out, given.text, given.steps)

"""Trains a V2 model and its softmax twin on the same text with several seeds, and compares their held-out losses.

python examples/pair.py runs/pair --steps 200 --seeds 3
"""

import argparse
from statistics import fmean

from diffattn import ModelShape, Recipe, build_pair, load_shape, prepare_data, train_model


def main(out: str, text: str, shape: ModelShape, steps: int, seeds: int) -> list[float]:
    data = prepare_data(text, vocab_size=shape.vocab_size, context=shape.max_position_embeddings)
    differences = []
    for seed in range(seeds):
        pair = build_pair(shape, "diff_v2", seed=seed)
        recipe = Recipe(steps=steps, seed=seed)
        diff = train_model(pair.model, data, recipe, f"{out}/diff_v2-seed{seed}")
        softmax = train_model(pair.twin, data, recipe, f"{out}/softmax-seed{seed}")
        differences.append(diff.val_loss - softmax.val_loss)
        print(f"seed {seed}: V2 {diff.val_loss:.4f}, softmax {softmax.val_loss:.4f} nats per token")
    print(f"mean difference {fmean(differences):+.4f}; diffattn compare gives it an interval and the costs beside it")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to write the runs into")
    parser.add_argument("--text", default="sotu", help="a file, a folder, or a data set's id")
    parser.add_argument("--shape", default="300K", help="a preset or a TOML file")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="pairs to train")
    given = parser.parse_args()
    main(given.out, given.text, load_shape(given.shape), given.steps, given.seeds)

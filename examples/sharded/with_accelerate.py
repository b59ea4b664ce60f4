"""Trains a V1 model on all ranks, in a loop that accelerate prepares.

torchrun --nproc-per-node 2 examples/sharded/with_accelerate.py, or accelerate launch in place of torchrun
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from diffattn import ModelShape, build_pair, load_shape, mesh_for, shard


def counting(vocabulary: int, rows: int) -> torch.Tensor:
    """Rows of 32 tokens that count up, each from a number of its own, in place of a text."""
    starts = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(32)) % vocabulary


def main(shape: ModelShape, steps: int, batch: int, dtype: torch.dtype) -> list[float]:
    # Without a GPU it would not look for other ranks.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    mesh = mesh_for(accelerator.num_processes, shard="full", device=accelerator.device.type)
    model = shard(build_pair(shape, "diff_v1").model, mesh, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = counting(shape.vocab_size, steps * batch)
    loader = DataLoader(text, batch_size=batch // accelerator.num_processes)
    # Everything but the model, which is in its place already.
    optimizer, loader = accelerator.prepare(optimizer, loader)
    losses = []
    for rows in loader:
        loss = model(rows, labels=rows, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="300K", help="a preset or a TOML file")
    parser.add_argument("--steps", type=int, default=10, help="steps to train")
    given = parser.parse_args()
    found = main(load_shape(given.shape), given.steps, 8, torch.bfloat16)
    if Accelerator().is_main_process:
        print("losses in nats per token:", *(f"{loss:.4f}" for loss in found))
    Accelerator().end_training()

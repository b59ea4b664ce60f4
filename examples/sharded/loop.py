"""Trains a V1 model on all ranks that torchrun starts, in a loop of one's own.

torchrun --nproc-per-node 2 examples/sharded/loop.py --tensor 2
"""

import argparse
import os

import torch
from torch import distributed

from diffattn import ModelShape, build_pair, data_ranks, load_shape, mesh_for, shard


def counting(vocabulary: int, rows: int) -> torch.Tensor:
    """Rows of 32 tokens that count up, each from a number of its own, in place of a text."""
    starts = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(32)) % vocabulary


def main(
    shape: ModelShape, steps: int, batch: int, dtype: torch.dtype, ways: str, tensor: int, out: str
) -> list[float]:
    world, device = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = mesh_for(world, shard=ways, tensor=tensor, per_host=int(os.environ["LOCAL_WORLD_SIZE"]), device=device)
    model = shard(build_pair(shape, "diff_v1").model, mesh, dtype=dtype)
    # The optimizer is made afterwards, because sharding replaces the parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Ranks that compute one layer together see the same rows.
    part, parts = data_ranks(mesh)
    text = counting(shape.vocab_size, steps * batch).view(steps, batch, -1)
    losses = []
    for rows in text.chunk(parts, dim=1)[part].to(device):
        loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    # All ranks take part, and rank 0 writes the whole model, which one process loads.
    model.save_pretrained(out)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="300K", help="a preset or a TOML file")
    parser.add_argument("--steps", type=int, default=10, help="steps to train")
    parser.add_argument("--batch", type=int, default=8, help="rows of all ranks in each step")
    parser.add_argument("--shard", default="full", help="full, hybrid or none")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that compute one layer together")
    parser.add_argument("--out", default="runs/sharded", help="folder to write the model into")
    given = parser.parse_args()
    shape = load_shape(given.shape)
    found = main(shape, given.steps, given.batch, torch.bfloat16, given.shard, given.tensor, given.out)
    if os.environ["RANK"] == "0":
        print("losses in nats per token:", *(f"{loss:.4f}" for loss in found))
    distributed.destroy_process_group()

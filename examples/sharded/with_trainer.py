"""Trains a V1 model on all ranks with the Trainer of transformers.

torchrun --nproc-per-node 2 examples/sharded/with_trainer.py
"""

import argparse
import os

import torch
from torch import distributed
from transformers import PrinterCallback, Trainer, TrainingArguments

from diffattn import ModelShape, build_pair, load_shape, mesh_for, shard


def counting(vocabulary: int, rows: int) -> torch.Tensor:
    """Rows of 32 tokens that count up, each from a number of its own, in place of a text."""
    starts = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(32)) % vocabulary


def main(shape: ModelShape, steps: int, batch: int, dtype: torch.dtype, out: str) -> list[float]:
    world, cpu = int(os.environ["WORLD_SIZE"]), not torch.cuda.is_available()
    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=batch // world,
        learning_rate=1e-3,
        use_cpu=cpu,
        # Neither `fsdp` nor `bf16`: the model is sharded already, and computes in its own dtype.
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    mesh = mesh_for(world, shard="full", device="cpu" if cpu else "cuda")
    model = shard(build_pair(shape, "diff_v1").model, mesh, dtype=dtype)
    text = counting(shape.vocab_size, steps * batch)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in text])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="300K", help="a preset or a TOML file")
    parser.add_argument("--steps", type=int, default=10, help="steps to train")
    parser.add_argument("--out", default="runs/sharded_trainer", help="folder to write the model into")
    given = parser.parse_args()
    found = main(load_shape(given.shape), given.steps, 8, torch.bfloat16, given.out)
    if os.environ["RANK"] == "0":
        print("losses in nats per token:", *(f"{loss:.4f}" for loss in found))
    distributed.destroy_process_group()

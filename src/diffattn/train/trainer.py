"""The Trainer of a run: with our order of blocks, our checkpoints, and ranks that share each batch."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from diffattn.errors import TrainingError
from diffattn.model.modeling import DiffTransformerLanguageModel
from diffattn.model.sharding import data_ranks, mesh_for, set_computation, shard
from diffattn.train.callbacks import Interruption
from diffattn.train.checkpoints.trainer import SavingTrainer
from diffattn.train.recipe import Recipe
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import Ranks
from diffattn.train.trackers.programs import PROJECT, run_name


class RankPart(Dataset[dict[str, torch.Tensor]]):
    """The samples that one rank trains on: its equal share of each batch, in the order of the run.

    >>> [RankPart(list("abcdefgh"), 4, part, 2)[2] for part in (0, 1)]
    ['e', 'g']
    """

    def __init__(self, samples: Dataset[dict[str, torch.Tensor]], batch_size: int, part: int, parts: int) -> None:
        self.samples, self.batch_size, self.part, self.parts = samples, batch_size, part, parts

    def __len__(self) -> int:
        return len(self.samples) // self.parts  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        share = self.batch_size // self.parts
        batch, place = divmod(index, share)
        return self.samples[batch * self.batch_size + self.part * share + place]


def spread(model: DiffTransformerLanguageModel, recipe: Recipe, layout: Layout, ranks: Ranks) -> tuple[int, int]:
    """Spreads a model over the ranks; returns which part of each batch this rank takes, and the number of parts."""
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else None
    if layout.shard == "none" and layout.tensor_parallel == 1:
        set_computation(model, checkpointing=layout.checkpointing, compiled=layout.compile)
        return ranks.rank.number, ranks.world
    mesh = mesh_for(
        ranks.world, shard=layout.shard, tensor=layout.tensor_parallel, per_host=ranks.rank.per_host,
        device=recipe.device,
    )  # fmt: skip
    shard(model, mesh, dtype=dtype, checkpointing=layout.checkpointing, compiled=layout.compile)
    return data_ranks(mesh)


def _joined(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins samples into a batch with a row per block, or a row per piece if blocks were cut into pieces."""
    return {
        name: torch.cat([sample[name].view(-1, sample[name].shape[-1]) for sample in samples])
        for name in ("input_ids", "labels")
    }


def _every(steps: int, times: int) -> int:
    return max(1, math.ceil(steps / times)) if times else steps + 1


def training_arguments(recipe: Recipe, folder: Path, *, parts: int = 1, placed: bool = False) -> TrainingArguments:
    """Returns the recipe as the arguments of the Trainer of ``transformers``.

    Args:
        recipe: the settings of the run.
        folder: the folder of the run.
        parts: the number of ranks that share each batch.
        placed: the model is spread over ranks already, and computes in the dtype that it was spread with.
    """
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // parts,
        per_device_eval_batch_size=2 * recipe.batch_size // parts,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(math.ceil(recipe.warmup_fraction * recipe.steps), recipe.steps - 1),
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused",
        seed=recipe.seed,
        bf16=recipe.dtype == "bfloat16" and not placed,
        use_cpu=recipe.device == "cpu",
        eval_strategy="steps" if recipe.evaluations else "no",
        eval_steps=_every(recipe.steps, recipe.evaluations),
        save_strategy="steps",
        save_steps=_every(recipe.steps, recipe.checkpoints),
        save_total_limit=None,
        # The library cannot save the optimizer of a model that is spread; our checkpoints have it.
        save_only_model=placed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        run_name=run_name(folder),
        project=PROJECT,
        # All ranks have the same number of tokens in each batch.
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )


class RunTrainer(SavingTrainer):
    """The library's Trainer with our order of blocks and checkpoints that are sealed before they appear.

    Args:
        model: the model, whole or spread over ranks.
        recipe: the settings of the run.
        folder: the folder of the run.
        samples: the samples that this rank trains on, in order.
        validation: the held-out samples of all ranks.
        interruption: of Ctrl-C.
        callbacks: what is called of each step.
        ranks: the ranks that train together.
        part: the part of each batch that this rank takes, and the number of parts.
    """

    def __init__(
        self,
        model: DiffTransformerLanguageModel,
        recipe: Recipe,
        folder: Path,
        samples: Dataset,
        validation: Dataset,
        interruption: Interruption,
        callbacks: list[TrainerCallback],
        *,
        ranks: Ranks,
        part: tuple[int, int],
    ) -> None:
        placed = model.is_distributed_loading_by_transformers
        # The option of the library has the name that PyTorch gave it before.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        super().__init__(
            folder,
            recipe.keep_checkpoints,
            interruption,
            model=model,
            args=training_arguments(recipe, folder, parts=part[1], placed=placed),
            train_dataset=samples,
            eval_dataset=validation,
            data_collator=_joined,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._ranks, self._part, self._placed = ranks, part, placed
        # The batches of a measurement that are this rank's own.
        self._counted = 0

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        # By this accelerate would share out each batch, which RankPart does; on a CPU it refuses to.
        arguments.pop("parallelism_config", None)
        return arguments

    def get_tp_size(self) -> int:
        # The library would divide the tokens of a batch by it, as if they were counted on all ranks.
        return 1

    def get_train_dataloader(self) -> DataLoader:
        # Each rank is given its own samples, so the library need not share them out.
        return DataLoader(
            self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        part, parts = self._part
        batches = [
            list(range(first, min(len(held_out), first + parts * self.args.eval_batch_size), parts))
            for first in range(part, len(held_out), parts * self.args.eval_batch_size)
        ]
        # A layer that is shared out is computed by all ranks or none, so they all need as many batches as rank 0.
        most = -(-len(held_out) // (parts * self.args.eval_batch_size))
        self._counted = len(batches)
        batches += [[0]] * (most - len(batches))
        return DataLoader(held_out, batch_sampler=batches, collate_fn=self.data_collator)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Returns the mean loss of all ranks' blocks, of which each may have another number."""
        # A copy that DDP has wrapped needs its wrapper for gradients alone.
        model = self.model
        # Training has them prepared; before it the same products have to be computed in bfloat16.
        half = torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        total, count = 0.0, 0
        for number, batch in enumerate(dataloader):
            with half:
                loss, _, _ = self.prediction_step(model, batch, prediction_loss_only=True)
            if number < self._counted:
                total, count = total + loss.item() * len(batch["input_ids"]), count + len(batch["input_ids"])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {"eval_loss": self._ranks.mean(total, count)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        # The library goes by names, and would decay the gain of V1's norm but no other norm's.
        return [name for name, weight in model.named_parameters() if weight.ndim >= 2]

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._ranks.world > 1 and not (self._placed or isinstance(model, DistributedDataParallel)):
            raise TrainingError(
                f"{self._ranks.world} ranks, on which nothing joins the gradients: each would train a model of its own",
                "a model that DDP or FSDP2 has wrapped",
                "unset the variables of accelerate in the environment, or take --shard full",
            )
        return super().training_step(model, *args, **kwargs)

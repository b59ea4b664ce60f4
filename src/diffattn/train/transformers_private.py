"""The names of ``transformers`` that training uses although the library does not promise to keep them.

They are methods of ``Trainer`` that our trainer, in ``diffattn.train.run`` and ``diffattn.train.checkpoints.trainer``,
overrides or calls; so they stand there, and this table says what they are for.
"""

from __future__ import annotations

from diffattn.private_names import PrivateName

_TESTED = ">=5.20,<5.25"
_TRAINER = "transformers.trainer:Trainer"
NAMES = (
    PrivateName(
        f"{_TRAINER}._build_accelerator_args", _TESTED,
        "accelerate refuses the ranks of a layer on a CPU, and shares out batches that are shared out already",
        "the library can be told that each rank is given its own samples",
    ),
    PrivateName(
        f"{_TRAINER}._save_checkpoint", _TESTED,
        "checkpoints are written in the library's format, whole on each rank, and nothing seals them",
        "the library takes a function that writes a checkpoint",
    ),
    PrivateName(
        f"{_TRAINER}._load_from_checkpoint", _TESTED,
        "the library looks for weights in its own format, and finds none",
        "the library takes a function that reads a checkpoint",
    ),
    PrivateName(
        f"{_TRAINER}._load_optimizer_and_scheduler", _TESTED,
        "a run that goes on begins with new weights and a new optimizer",
        "the library takes a function that reads a checkpoint",
    ),
    PrivateName(
        f"{_TRAINER}._load_rng_state", _TESTED,
        "a run that goes on draws other random numbers",
        "the library takes a function that reads a checkpoint",
    ),
)  # fmt: skip

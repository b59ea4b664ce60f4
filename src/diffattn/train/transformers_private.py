"""The names of ``transformers`` that training uses although the library does not promise to keep them.

They are methods of ``Trainer`` that our trainer, in ``diffattn.train.run`` and ``diffattn.train.checkpoints.trainer``,
overrides or calls; so they stand there, and this table says what they are for.
"""

from __future__ import annotations

from diffattn.private_names import PrivateName

_TESTED = ">=5.20,<5.24"
_TRAINER = "transformers.trainer:Trainer"
NAMES = (
    PrivateName(
        f"{_TRAINER}._get_train_sampler", _TESTED,
        "a run that goes on sees other blocks than a run that was not cut",
        "the library takes a sampler, or can be told to keep the order of the data set",
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

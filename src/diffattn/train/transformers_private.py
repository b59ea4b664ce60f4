"""The names of ``transformers`` that training uses although the library does not promise to keep them.

They are methods of ``Trainer`` that our trainer, in ``diffattn.train.run``, overrides or calls; so they stand there,
and this table says what they are for.
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
        f"{_TRAINER}._get_output_dir", _TESTED,
        "checkpoints are not written into the folder that is sealed when it is whole",
        "the folder of a single checkpoint can be set",
    ),
    PrivateName(
        f"{_TRAINER}._save_checkpoint", _TESTED,
        "a run that is killed while it saves leaves half a checkpoint",
        "the library writes a checkpoint whole or not at all",
    ),
    PrivateName(
        f"{_TRAINER}._load_from_checkpoint", _TESTED,
        "a run that was cut between saving and measuring lacks one measurement",
        "the library has a public function that loads a checkpoint's weights into a trainer",
    ),
)  # fmt: skip

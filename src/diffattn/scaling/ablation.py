"""The variants with one thing changed each, trained as one ladder and read as one table.

Source: arXiv 2410.05258v2, Table 6, for V1; "Differential Transformer V2" (20 January 2026), its ablations, for V2;
arXiv 2505.06708 for gated attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffattn.errors import DataError
from diffattn.intervals import paired_difference, verdict
from diffattn.results.ablation import AblationResult, ArmPair, ArmResult
from diffattn.results.ladder import LadderRow
from diffattn.scaling.arms import ARMS

_RECIPE = (
    "hidden_size",
    "num_layers",
    "group",
    "tokens",
    "context",
    "vocab_size",
    "batch_size",
    "match",
    "dtype",
    "data_digest",
)


def ablation(rows: Sequence[LadderRow], *, command: str = "diffattn.ablation(...)") -> AblationResult:
    """Says what each change does to the held-out loss, from the rows of one size of a ladder.

    Args:
        rows: the rows of :func:`diffattn.scaling.ladder.run_ladder`, all of one size and recipe.
        command: the command that made the result.

    Raises:
        DataError: no rows, rows of several sizes or recipes, or of an arm that is unknown.

    Source: the change and its comparison are the papers'; the interval is Student's t over pairs.
    """
    losses: dict[str, dict[int, float]] = {}
    parameters: dict[str, int] = {}
    if not rows:
        raise DataError("no rows given", "the rows of a ladder", "run it first: diffattn eval ablation")
    for key in _RECIPE:
        if len(found := {getattr(row, key) for row in rows}) > 1:
            raise DataError(
                f"rows have {key} {', '.join(map(str, sorted(found)))}", "one size and recipe", "leave the others out"
            )
    for row in rows:
        if row.arm not in ARMS:
            raise DataError(f"a row has attention {row.arm!r}", f"one of {', '.join(ARMS)}", "leave that row out")
        losses.setdefault(row.arm, {})[row.seed] = row.val_loss
        parameters[row.arm] = row.parameters
    arms = [name for name in ARMS if name in losses]
    seeds = sorted({seed for mine in losses.values() for seed in mine})
    return AblationResult(
        seeds=seeds,
        recipe={key: getattr(rows[0], key) for key in _RECIPE},
        variants={
            name: ArmResult(
                changed=ARMS[name].changed,
                base=ARMS[name].base,
                parameters=parameters[name],
                val_loss=[losses[name].get(seed) for seed in seeds],
            )
            for name in arms
        },
        pairs={name: pair for name in arms if (pair := _pair(name, losses, parameters)) is not None},
        command=command,
    )


def _pair(name: str, losses: Mapping[str, dict[int, float]], parameters: Mapping[str, int]) -> ArmPair | None:
    """Returns an arm against its base over the seeds that both have; None where there are none."""
    base = ARMS[name].base
    if base is None or base not in losses:
        return None
    seeds = sorted(losses[name].keys() & losses[base].keys())
    if not seeds:
        return None
    mine, theirs = ([losses[arm][seed] for seed in seeds] for arm in (name, base))
    difference = paired_difference(mine, theirs)
    ratio = parameters[name] / parameters[base]
    return ArmPair(
        base=base,
        seeds=seeds,
        val_loss_difference=difference,
        parameters_ratio=ratio,
        verdict=verdict(name, difference, seeds=len(seeds), surplus=ratio - 1),
    )

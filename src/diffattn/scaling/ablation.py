"""The variants with one thing changed each, trained as one ladder and read as one table.

Source: arXiv 2410.05258v2, Table 6, for V1; "Differential Transformer V2" (20 January 2026), its ablations, for V2;
arXiv 2505.06708 for gated attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffattn.errors import DataError
from diffattn.intervals import paired_difference, verdict
from diffattn.scaling.arms import ARMS

_SIZE = ("hidden_size", "num_layers", "tokens", "context", "vocab_size", "batch_size", "match", "dtype", "data_digest")


def ablation(rows: Sequence[dict[str, Any]], *, command: str = "diffattn.ablation(...)") -> dict[str, Any]:
    """What each change does to the held-out loss, from the rows of one size of a ladder.

    Args:
        rows: of :func:`diffattn.scaling.ladder.run_ladder`, all of one size and recipe.
        command: what is said to have made the result.

    Returns:
        ``variants`` by arm: ``changed`` in words, ``base``, ``parameters``, ``val_loss`` of every seed, None where it
        has none. ``pairs`` by arm: its ``baseline``, ``seeds``, the ``val_loss_difference`` from it over the seeds that
        both have, with its 95% interval, ``parameters_ratio`` and a ``verdict``. ``seeds``: all that there are.

    Raises:
        DataError: no rows, rows of several sizes or recipes, or of an arm that is unknown.

    Source: the change and its comparison are the papers'; the interval is Student's t over pairs.
    """
    losses: dict[str, dict[int, float]] = {}
    parameters: dict[str, int] = {}
    if not rows:
        raise DataError("no rows given; wanted those of a ladder: run it first")
    for key in _SIZE:
        if len(found := {row[key] for row in rows}) > 1:
            raise DataError(f"rows have {key} {', '.join(map(str, sorted(found)))}; wanted one size and recipe")
    for row in rows:
        if row["attention"] not in ARMS:
            raise DataError(f"a row has attention {row['attention']!r}; wanted one of {', '.join(ARMS)}")
        losses.setdefault(row["attention"], {})[row["seed"]] = row["val_loss"]
        parameters[row["attention"]] = row["parameters"]
    arms = [name for name in ARMS if name in losses]
    seeds = sorted({seed for mine in losses.values() for seed in mine})
    return {
        "study": "ablation",
        "seeds": seeds,
        "recipe": {key: rows[0][key] for key in _SIZE},
        "variants": {
            name: {
                "changed": ARMS[name].changed,
                "base": ARMS[name].base,
                "parameters": parameters[name],
                "val_loss": [losses[name].get(seed) for seed in seeds],
            }
            for name in arms
        },
        "pairs": {name: pair for name in arms if (pair := _pair(name, losses, parameters)) is not None},
        "command": command,
    }


def _pair(name: str, losses: dict[str, dict[int, float]], parameters: dict[str, int]) -> dict[str, Any] | None:
    base = ARMS[name].base
    if base is None or base not in losses:
        return None
    seeds = sorted(losses[name].keys() & losses[base].keys())
    if not seeds:
        return None
    mine, theirs = ([losses[arm][seed] for seed in seeds] for arm in (name, base))
    difference = paired_difference(mine, theirs)
    ratio = parameters[name] / parameters[base]
    return {
        "baseline": base,
        "seeds": seeds,
        "val_loss_difference": difference,
        "parameters_ratio": ratio,
        "verdict": verdict(name, difference, seeds=len(seeds), surplus=ratio - 1),
    }

"""A plan as rows of text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffattn.numbers import count, flops, seconds, size

WRITE = {"size": size, "count": count, "flops": flops, "seconds": seconds}


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The two models side by side as text: a header, then one row per quantity, with the ratio at the end.

    >>> from diffattn.plan.answer import plan
    >>> rows = table(plan("diff_v1:3M", "softmax:3M", context=256, machine=None))
    >>> rows[0], [row for row in rows if row[0].startswith("KV")]
    (['', 'diff_v1:3M', 'softmax:3M', 'ratio'], [['KV cache (per token)', '3.75 KiB', '3.75 KiB', '1.00×']])
    """
    rows = [["", result["model"]["name"], result["against"]["name"], "ratio"]]
    for row in result["ratios"]:
        label = f"{row['label']} ({row['unit']})" if row["unit"] else row["label"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}×"
        rows.append([label, *(WRITE[row["format"]](row[side]) for side in ("model", "against")), ratio])
    return rows


def backend_table(result: Mapping[str, Any]) -> list[list[str]]:
    """What each backend costs, as text; the first row is the header.

    ``maps`` are bytes of T × T maps in training, ``to twin`` their ratio to those of a softmax model of the same shape,
    ``FLOPs/token`` what training executes, ``training`` and ``inference`` peaks of memory.

    >>> from diffattn.plan.answer import plan
    >>> [row[:3] for row in backend_table(plan("diff_v2:3M", "softmax:3M", context=256, machine=None))][4]
    ['diff_v2:3M', 'materialised', '22.5 MiB']
    """
    rows = [["model", "backend", "maps", "to twin", "cache", "FLOPs/token", "training", "inference"]]
    for row in result["backends"]:
        ratio = row["score_ratio_to_twin"]
        rows.append(
            [row["model"], row["backend"], size(row["score_bytes"]), "–" if ratio is None else f"{ratio:.2f}×",
             size(row["cache_bytes"]), flops(row["training_flops_per_token"]), size(row["training_bytes"]),
             size(row["inference_bytes"])]
        )  # fmt: skip
    return rows

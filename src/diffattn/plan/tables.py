"""A plan as rows of text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffattn.humanize import count, flops, seconds, size
from diffattn.plan.precision import PRECISIONS, Precision

WRITE = {"size": size, "count": count, "flops": flops, "seconds": seconds}


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The models side by side as text: a header, then one row per quantity, with the ratio of two at the end.

    >>> from diffattn.plan.answer import plan
    >>> rows = table(plan("diff_v1:3M", "softmax:3M", context=256, machine=None))
    >>> rows[0], [row for row in rows if row[0].startswith("KV")]
    (['', 'diff_v1:3M', 'softmax:3M', 'ratio'], [['KV cache (per token)', '3.75 KiB', '3.75 KiB', '1.00×']])
    """
    sides = [side for side in ("model", "against") if result[side] is not None]
    ratio = len(sides) > 1
    rows = [["", *(result[side]["name"] for side in sides), *(["ratio"] if ratio else [])]]
    for row in result["ratios"]:
        label = f"{row['label']} ({row['unit']})" if row["unit"] else row["label"]
        rows.append([label, *(WRITE[row["format"]](row[side]) for side in sides)])
        if ratio:
            rows[-1].append("" if row["ratio"] is None else f"{row['ratio']:.2f}×")
    return rows


def setting_line(result: Mapping[str, Any]) -> str:
    """What the numbers hold for, in one line.

    >>> from diffattn.plan.answer import plan
    >>> setting_line(plan("diff_v1:3M", machine="rtx 3060", context=256))
    'machine: RTX 3060 12GB; context: 256; batch: 1; precision: mixed; backend: standard'
    """
    setting = result["setting"]
    dtypes = Precision(**setting["precision"])
    named = [name for name, known in PRECISIONS.items() if known == dtypes]
    listed = ", ".join(f"{part} {dtype}" for part, dtype in setting["precision"].items() if dtype is not None)
    parts = {
        "machine": "none, so no times" if setting["machine"] is None else setting["machine"]["name"],
        "context": f"{setting['context']:,}",
        "batch": f"{setting['batch']:,}",
        "precision": named[0] if named else listed,
        "backend": setting["backend"],
    }
    parts |= {"checkpointing": "on"} if setting["checkpointing"] else {}
    parts |= {key: str(setting[key]) for key in ("fsdp", "tp") if setting[key] > 1}
    return "; ".join(f"{key}: {value}" for key, value in parts.items())


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

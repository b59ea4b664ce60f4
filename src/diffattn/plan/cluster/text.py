"""The words of a plan on a cluster, and its tables for a terminal."""

from __future__ import annotations

from diffattn.humanize import count, seconds, size
from diffattn.plan.cluster.answer import FILLED, ClusterModel, ClusterPlan, Layout


def lines(plan: ClusterPlan) -> list[str]:
    """Returns what has to be known before the tables are read."""
    cluster = plan.cluster
    own = cluster.machine.memory
    assert own is not None
    found = [
        f"cluster: {cluster.name}; hosts: {cluster.hosts} of {cluster.per_host}; inside a host "
        f"{cluster.inside / 1e9:.4g} GB/s each way, between hosts {cluster.between * 8 / 1e9:.4g} Gb/s for each GPU; "
        f"links: {cluster.source}.",
        f"Assumed, not measured: arithmetic runs at {plan.utilization:.0%} of the peak rate. A layout fits where a "
        f"rank's peak is at most {FILLED:.0%} of {size(own)}. At least: arithmetic and exchange at peak rates, side by "
        f"side; at most one after another.",
    ]
    for model in plan.models:
        if not model.best.fits:
            found.append(
                f"{model.name} fits in no layout: the smallest takes {size(model.best.memory.total)} on a rank."
            )
    return found


def table(plan: ClusterPlan) -> list[list[str]]:
    """Returns the models side by side, each in its best layout; the first row is the header."""
    rows: list[tuple[str, list[str]]] = [
        ("Tokens in a sequence", [f"{model.context:,}" for model in plan.models]),
        ("Tokens in a step", [count(model.step_tokens) for model in plan.models]),
        ("Layout: shard", [model.best.shard for model in plan.models]),
        ("  tp", [str(model.best.tp) for model in plan.models]),
        ("  checkpointing", ["on" if model.best.checkpointing else "off" for model in plan.models]),
        ("  sequences a rank", [str(model.best.sequences) for model in plan.models]),
        ("  passes a step", [str(model.best.passes) for model in plan.models]),
        ("Memory of a rank", [size(model.best.memory.total) for model in plan.models]),
        ("  of it weights", [size(model.best.memory.weights) for model in plan.models]),
        ("  of it optimizer state", [size(model.best.memory.optimizer) for model in plan.models]),
        ("  of it activations", [size(model.best.memory.activations) for model in plan.models]),
        ("Fits", ["yes" if model.best.fits else "no" for model in plan.models]),
        ("Exchanged in a pass", [size(model.best.traffic.total) for model in plan.models]),
        ("Step, arithmetic at peak", [seconds(model.best.compute_seconds) for model in plan.models]),
        ("Step, exchange", [seconds(model.best.traffic_seconds) for model in plan.models]),
        ("Step, at least", [seconds(model.best.least_seconds) for model in plan.models]),
        ("Step, one after another", [seconds(model.best.serial_seconds) for model in plan.models]),
        ("Step, as assumed", [seconds(model.best.assumed_seconds) for model in plan.models]),
        ("Tokens/s, at most", [count(model.most_tokens_per_second) for model in plan.models]),
        ("Tokens/s, as assumed", [count(model.tokens_per_second) for model in plan.models]),
        ("MFU, as assumed", [f"{model.best.mfu:.0%}" for model in plan.models]),
        (f"Hours to {count(plan.tokens)} tokens", [f"{model.hours:,.0f}" for model in plan.models]),
        ("GPU-hours", [f"{model.gpu_hours:,.0f}" for model in plan.models]),
        ("GPU-hours, at least", [f"{model.least_gpu_hours:,.0f}" for model in plan.models]),
    ]
    return [["", *(model.name for model in plan.models)], *([label, *values] for label, values in rows)]


def layout_table(model: ClusterModel, *, most: int = 6) -> list[list[str]]:
    """Returns the best layouts of one model; the first row is the header."""

    def row(layout: Layout) -> list[str]:
        return [
            layout.shard, str(layout.tp), "on" if layout.checkpointing else "off", str(layout.sequences),
            size(layout.memory.total), "yes" if layout.fits else "no", seconds(layout.traffic_seconds),
            seconds(layout.assumed_seconds),
        ]  # fmt: skip

    head = ["shard", "tp", "checkpointing", "sequences", "memory", "fits", "exchange", "step"]
    return [head, *(row(layout) for layout in model.layouts[:most])]

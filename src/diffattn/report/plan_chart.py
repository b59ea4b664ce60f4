"""The charts of the planner's page, over a grid of the planner's own estimates.

Their parameters ``context`` and ``batch`` are places on the page's sliders; each chart shows the rows of that place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from diffattn import humanize
from diffattn.plan.blocks.estimate import estimate_model
from diffattn.plan.estimate import Estimate
from diffattn.plan.result import Plan
from diffattn.report import charts

if TYPE_CHECKING:
    import altair as alt

CONTEXTS = tuple(2**power for power in range(7, 21))
BATCHES = tuple(2**power for power in range(11))
# Tints by which parts are known, by the colour-blind too; the models keep their own colours.
PARTS = {
    "weights": ("weights", "#56b4e9"),
    "gradients": ("gradients", "#009e74"),
    "optimizer": ("optimizer state", "#b8860b"),
    "cache": ("key/value cache", "#b0548b"),
    "activations": ("activations", "#e69f00"),
    "scores": ("score matrices", "#d1242f"),
    "workspace": ("workspace", "#8c959f"),
}
LIMIT_COLOUR = "#e5484d"
# Pixels of a bar with the words above it.
ROW = 58
UNITS = {2**40: "TiB", 2**30: "GiB", 2**20: "MiB", 2**10: "KiB"}
# Contexts are named by powers of 1024: 4096 is 4k.
CONTEXT_TICKS = (
    "datum.value < 1024 ? datum.value : datum.value < 1048576 ? datum.value / 1024 + 'k' : datum.value / 1048576 + 'M'"
)


class Line(NamedTuple):
    """A quantity that is drawn against the context: its title, the function of ``humanize`` for it, where it is."""

    title: str
    form: str
    value: Callable[[Estimate], float | None]


def _training_peak(found: Estimate) -> float | None:
    return None if found.training is None else found.training.memory.total


def _training_speed(found: Estimate) -> float | None:
    return None if found.training is None else found.training.tokens_per_second


LINES = {
    "training-memory": Line("peak bytes of a training step", "size", _training_peak),
    "inference-memory": Line("peak bytes of prefill and decoding", "size", lambda found: found.inference_peak),
    "training-speed": Line("tokens/s at most", "count", _training_speed),
    "decoding-speed": Line("tokens/s at most, all sequences", "count", lambda found: found.decoding.tokens_per_second),
}


class Grid:
    """The planner's estimates at every context and batch of the page.

    Args:
        plan: the plan whose models, and whose setting beside context and batch, the page is of.
    """

    def __init__(self, plan: Plan) -> None:
        own = plan.setting
        self.plan = plan
        self.contexts = sorted({*CONTEXTS, own.context})
        self.batches = sorted({*BATCHES, own.batch})
        self.start = {"context": self.contexts.index(own.context), "batch": self.batches.index(own.batch)}
        # One estimate for each model at each point, batches within contexts.
        self.estimates = [
            [
                estimate_model(model.shape, model.attention, replace(own, context=context, batch=batch))
                for model in plan.models
            ]
            for context in self.contexts
            for batch in self.batches
        ]

    def values(self, key: str) -> list[float | None]:
        """A quantity of ``LINES`` for each row of ``columns``."""
        return [LINES[key].value(found) for at_point in self.estimates for found in at_point]

    def columns(self) -> dict[str, list[object]]:
        """The point and the model of each row of a chart's data, as columns: places on the sliders, tokens, names."""
        places = [(context, batch) for context in range(len(self.contexts)) for batch in range(len(self.batches))]
        rows = [(context, batch, model) for context, batch in places for model in self.plan.models]
        return {
            "at context": [context for context, _, _ in rows],
            "at batch": [batch for _, batch, _ in rows],
            "tokens": [self.contexts[context] for context, _, _ in rows],
            "context in words": [f"{self.contexts[context]:,} tokens" for context, _, _ in rows],
            "model": [model.name for _, _, model in rows],
        }


def looks_of(plan: Plan) -> list[charts.Look]:
    """The look of each model; the second of one variant takes another look."""
    variants = [model.attention for model in plan.models]
    looks = [charts.look(variant, variants) for variant in variants]
    return [looks[0], charts.MORE_LOOKS[0]] if len(set(variants)) < len(variants) else looks


def bar_chart(grid: Grid, phases: Sequence[str], *, bound: bool = False) -> alt.LayerChart:
    """One bar per model and phase at the point that the sliders chose, cut into its parts.

    Args:
        grid: the estimates.
        phases: of ``training``, ``prefill`` and ``decoding``.
        bound: whether this chart brings the sliders, which all charts follow. Default: False.
    """
    import altair as alt

    named = [
        (f"{model.name} {phase}" if len(phases) > 1 else model.name, getattr(found, phase).memory)
        for phase in phases
        for at_point in grid.estimates
        for model, found in zip(grid.plan.models, at_point, strict=True)
    ]
    memories = [memory.to_json() for _, memory in named]
    parts = {label: key for key, (label, _) in PARTS.items() if any(memory.get(key) for memory in memories)}
    columns: dict[str, list[object]] = {key: column * len(phases) for key, column in grid.columns().items()}
    columns["bar"] = [bar for bar, _ in named]
    columns["all"] = [_share(memory["total"], grid.plan) for memory in memories]
    for label, key in parts.items():
        columns[label] = [memory.get(key, 0) for memory in memories]
        columns[f"{label} in words"] = [humanize.size(memory.get(key, 0)) for memory in memories]
    # Ticks are round numbers of the unit that the largest bar has at first.
    places = zip(columns["at context"], columns["at batch"], strict=True)
    first = [
        memory["total"] for memory, place in zip(memories, places, strict=True) if place == tuple(grid.start.values())
    ]
    size, unit = next(((size, unit) for size, unit in UNITS.items() if max(first) >= size), (1, "B"))
    chosen = (
        alt.Chart()
        .transform_flatten(list(columns))
        .transform_filter("datum['at context'] === context && datum['at batch'] === batch")
    )
    y = alt.Y("bar:N", axis=None, sort=list(dict.fromkeys(bar for bar, _ in named)))
    bars = (
        chosen.transform_fold(list(parts), as_=["part", "bytes"])
        .transform_calculate(
            words="datum[datum.part + ' in words']",
            order=f"indexof({list(parts)}, datum.part)",
            amount=f"datum.bytes / {size}",
        )
        .mark_bar(height=22, yOffset=10)
        .encode(
            x=alt.X("amount:Q", title=f"{unit} at the peak", axis=alt.Axis(tickCount=5, format=",~r"), stack="zero"),
            y=y,
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=list(parts), range=[PARTS[key][1] for key in parts.values()]),
                legend=alt.Legend(orient="bottom", columns=3, symbolType="square"),
            ),
            order="order:Q",
            tooltip=charts.tooltips(bar="model", part="part", words="bytes"),
        )
    )
    words = [
        chosen.mark_text(align="left", dy=-14, fontWeight="bold").encode(x=alt.value(0), y=y, text="bar:N"),
        chosen.mark_text(align="right", dy=-14).encode(x=alt.value("width"), y=y, text="all:N"),
    ]
    told = f"Bytes at the peak of {' and '.join(phases)} by part, at the context and the batch of the sliders."
    layers = charts.layered([bars, *words], _data(columns)).add_params(*_parameters(grid, bound))
    return layers.properties(description=told, width="container", height=ROW * len(phases) * len(grid.plan.models))


def line_chart(grid: Grid, key: str) -> alt.LayerChart:
    """One quantity against the context at the batch of the slider; a line marks the context of the other slider."""
    import altair as alt

    title, form, _ = LINES[key]
    values, looks = grid.values(key), looks_of(grid.plan)
    known = [value for value in values if value is not None]
    written: Callable[[float | None], str] = getattr(humanize, form)
    columns = grid.columns()
    columns |= {"value": list(values), "words": [written(value) for value in values]}
    of_batch = alt.Chart().transform_flatten(list(columns)).transform_filter("datum['at batch'] === batch")
    x = alt.X(
        "tokens:Q",
        title="context (tokens)",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(values=list(CONTEXTS), labelExpr=CONTEXT_TICKS, labelOverlap="greedy"),
    )
    bytes_ = form == "size"
    ticks = [2**power for power in range(60)] if bytes_ else charts.round_numbers(min(known), max(known))
    scale = alt.Scale(type="log", base=2 if bytes_ else 10, nice=False, padding=4)
    label = charts.BYTE_TICKS if bytes_ else charts.COUNT_TICKS
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(labelExpr=label, values=ticks, labelOverlap="greedy"))
    names, legend = [model.name for model in grid.plan.models], charts.line_legend(columns=2)
    colour = alt.Color("model:N", scale=alt.Scale(domain=names, range=[look.colour for look in looks]), legend=legend)
    dashes = alt.Scale(domain=names, range=[list(look.dash) or charts.SOLID for look in looks])
    chosen = alt.selection_point(fields=["model"], bind="legend", name=f"chosen_{key.replace('-', '_')}")
    base = of_batch.encode(
        x=x,
        y=y,
        color=colour,
        tooltip=charts.tooltips(**{"model": "model", "context in words": "context", "words": title}),
    )
    here = base.transform_filter("datum['at context'] === context")
    layers = [
        base.mark_line(strokeWidth=2).encode(
            strokeDash=alt.StrokeDash("model:N", scale=dashes, legend=legend),
            opacity=alt.condition(chosen, alt.value(1), alt.value(0.15)),
        ),
        # Where one points at a line, its nearest context is told.
        base.mark_point(size=90, opacity=0, filled=True),
        here.mark_rule(strokeDash=[2, 3], opacity=0.6).encode(
            y=alt.value(0), y2=alt.value("height"), color=alt.value(charts.INK)
        ),
        here.mark_point(size=60, filled=True, opacity=1),
        *(_limit(here, grid.plan) if bytes_ else []),
    ]
    layered = charts.layered(layers, _data(columns)).add_params(chosen, *_parameters(grid, bound=False))
    return layered.properties(description=f"{title} against the context.", width="container", height=280)


def _limit(here: alt.Chart, plan: Plan) -> list[alt.Chart]:
    """The machine's memory as a line with its name, over the data of the chart."""
    import altair as alt

    machine = plan.setting.machine
    if machine is None or machine.memory is None:
        return []
    y, colour = alt.YDatum(machine.memory), alt.value(LIMIT_COLOUR)
    words = alt.value(f"memory of {machine.name}")
    return [
        here.mark_rule(strokeWidth=1.2).encode(x=alt.value(0), x2=alt.value("width"), y=y, color=colour),
        here.mark_text(align="left", dx=6, dy=-7).encode(x=alt.value(0), y=y, color=colour, text=words),
    ]


def _data(columns: Mapping[str, list[object]]) -> alt.Data:
    """Columns as the data of a chart, which names each of them once; ``transform_flatten`` makes the rows."""
    import altair as alt

    return alt.Data(values=[dict(columns)])


def _parameters(grid: Grid, bound: bool) -> list[alt.Parameter]:
    """The context and the batch as places on their sliders; the page joins those of all charts."""
    import altair as alt

    places = {"context": len(grid.contexts), "batch": len(grid.batches)}

    def slider(name: str) -> alt.BindRange:
        return alt.binding_range(min=0, max=places[name] - 1, step=1, name=name, element="#controls")

    return [
        alt.param(name=name, value=place, bind=slider(name)) if bound else alt.param(name=name, value=place)
        for name, place in grid.start.items()
    ]


def _share(total: int, plan: Plan) -> str:
    """A sum of bytes, and what part of the machine's memory it is."""
    memory = None if plan.setting.machine is None else plan.setting.machine.memory
    share = "" if not memory else f", {total / memory:.{1 if total < 0.1 * memory else 0}%} of {humanize.size(memory)}"
    return humanize.size(total) + share

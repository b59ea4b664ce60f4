"""The charts of studies and of an ablation: what they draw is what was measured."""

from pathlib import Path
from typing import Any

from diffattn.report.charts import specification
from diffattn.report.difference_chart import difference_chart
from diffattn.report.study_chart import study_chart, study_rows, write_study_png
from diffattn.results.ablation import AblationResult, ArmPair, ArmResult
from diffattn.results.interval import Interval
from diffattn.results.study import Axes, ModelPoint, PointResult, StudyTable

NAMES = ["softmax", "diff_v1", "mine"]


def point(panel: str, x: float, by: float | None = None, names: list[str] = NAMES) -> PointResult:
    models = {
        name: ModelPoint(
            mean=x + place, low=x + place - 0.25, high=x + place + 0.25, values=3, is_first=not place,
            difference=Interval(place, place - 0.5, place + 0.5) if place else None,
        )
        for place, name in enumerate(names)
    }  # fmt: skip
    return PointResult(panel=panel, x=x, by=by, models=models)


def study(points: list[PointResult], *, by: str = "", logarithmic: bool = False) -> StudyTable:
    axes = Axes(x="depth", y="share of attention", by=by, logarithmic=logarithmic)
    return StudyTable(study="noise", names=NAMES, points=points, axes=axes)


def drawn(result: StudyTable) -> dict[str, Any]:
    return specification(study_chart(result))


def test_a_line_per_model_with_its_interval() -> None:
    points = [point("answer", 64), point("answer", 1024), point("noise", 64, names=["softmax", "mine"])]
    answer, noise = drawn(study(points, logarithmic=True))["concat"]
    band, line, marks = answer["layer"]
    assert (answer["title"], noise["title"]) == ("answer", "noise")
    rows = answer["data"]["values"]
    assert [(row["model"], row["x"], row["mean"], row["low"], row["high"]) for row in rows] == [
        (name, x, x + place, x + place - 0.25, x + place + 0.25) for x in (64, 1024) for place, name in enumerate(NAMES)
    ]
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]["field"]) == ("low", "high")
    assert line["encoding"]["y"]["field"] == "mean"
    assert line["encoding"]["x"]["axis"]["values"] == [64, 1024]
    assert line["encoding"]["x"]["scale"]["type"] == "log"
    assert marks["encoding"]["tooltip"][-1]["field"] == "in digits"
    # A panel of one setting has the models side by side; one that lacks it is not there.
    assert noise["layer"][0]["encoding"]["x"]["field"] == "model"
    assert [row["model"] for row in noise["data"]["values"]] == ["softmax", "mine"]


def test_a_variant_has_its_own_colour_and_any_other_model_another() -> None:
    chart = drawn(study([point("answer", 1), point("answer", 2)]))["concat"][0]["layer"][1]
    scale = chart["encoding"]["color"]["scale"]
    assert scale["domain"] == NAMES
    assert len(set(scale["range"])) == 3
    assert scale["range"][:2] == ["#222222", "#0072B2"]
    assert len({str(dash) for dash in chart["encoding"]["strokeDash"]["scale"]["range"]}) == 3


def test_two_axes_are_a_map_per_model_that_has_the_panel() -> None:
    points = [point("answer", x, by) for x in (0, 1) for by in (512, 1024)]
    points += [point("map_pos: answer", 0, by, names=["diff_v1"]) for by in (512, 1024)]
    first, second = drawn(study(points, by="tokens"))["vconcat"]
    assert [chart["title"] for chart in first["hconcat"]] == [f"{name}: answer" for name in NAMES]
    assert [chart["title"] for chart in second["hconcat"]] == ["diff_v1: map_pos: answer"]
    cells = first["hconcat"][1]["data"]["values"]
    assert [(cell["x"], cell["by"], cell["mean"], cell["in digits"]) for cell in cells] == [
        (0, 512, 1, "1.00"), (0, 1024, 1, "1.00"), (1, 512, 2, "2.00"), (1, 1024, 2, "2.00")
    ]  # fmt: skip
    assert study_rows(study(points, by="tokens"))[0][:3] == ["noise", "tokens", "depth"]


def test_the_picture_is_a_png_of_ours(tmp_path: Path) -> None:
    write_study_png(study([point("answer", 1), point("answer", 2)]), tmp_path / "study.png")
    made = (tmp_path / "study.png").read_bytes()
    assert made.startswith(b"\x89PNG")
    assert b"Software\0diffattn" in made
    assert len(made) < 200_000


def test_an_ablation_names_what_each_arm_is_compared_with() -> None:
    def arm(base: str | None, losses: list[float | None]) -> ArmResult:
        return ArmResult(changed="a thing", base=base, parameters=1000, val_loss=losses)

    def pair(base: str, mean: float) -> ArmPair:
        difference = Interval(mean, mean - 1, mean + 1)
        return ArmPair(base=base, seeds=[0, 2], val_loss_difference=difference, verdict="", parameters_ratio=1.0)

    variants = {
        "softmax": arm(None, [3.0, 3.5, 4.0]),
        "diff_v1": arm("softmax", [3.25, None, 4.5]),
        "diff_v1+no_norm": arm("diff_v1", [3.0, 3.0, 4.75]),
    }
    pairs = {"diff_v1": pair("softmax", 0.375), "diff_v1+no_norm": pair("diff_v1", 0.0)}
    result = AblationResult(seeds=[0, 1, 2], recipe={}, variants=variants, pairs=pairs, command="")
    chart = specification(difference_chart(result))
    rows = chart["data"]["values"]
    assert [row["title"] for row in rows] == ["diff_v1 − softmax", "diff_v1+no_norm − diff_v1"]
    seeds = next(
        layer["data"]["values"]
        for layer in chart["layer"]
        if "seed" in layer.get("data", {"values": [{}]})["values"][0]
    )
    # A seed that one of the two lacks is left out, and the others keep their names.
    assert [(row["variant"], row["seed"], row["difference"]) for row in seeds] == [
        ("diff_v1", "seed 0", 0.25), ("diff_v1", "seed 2", 0.5),
        ("diff_v1+no_norm", "seed 0", -0.25), ("diff_v1+no_norm", "seed 2", 0.25),
    ]  # fmt: skip
    words = [
        row["word"] for layer in chart["layer"] for row in layer.get("data", {"values": []})["values"] if "word" in row
    ]
    assert words == ["← better", "worse →"]

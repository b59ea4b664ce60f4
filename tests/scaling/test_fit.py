"""Scaling laws: the paper's points, planted laws that come back, and what may be said of them."""

import math

import numpy as np
import pytest

from diffattn.errors import ConfigError, DataError
from diffattn.results.scaling import Equivalence, ScalingPoint, ScalingResult
from diffattn.scaling import fit as module
from diffattn.scaling.fit import fit_scaling, interval
from diffattn.scaling.forms import FLOOR, JOINT, POWER, fit_form, huber, refine, refit
from diffattn.scaling.points import check_points, read_points

SIZES = (0.2e6, 0.55e6, 1.2e6, 1.9e6, 4.2e6)
PLANTED = {"softmax": (1.9, 40.0, 0.26), "diff_v1": (1.9, 39.0, 0.26)}


def ladder(
    seed: int, *, noise: float = 0.004, shared: float = 0.003, laws: dict = PLANTED, seeds: int = 3
) -> list[ScalingPoint]:
    """Points on planted laws; what a seed adds is partly common to the variants."""
    rng = np.random.default_rng(seed)
    points = []
    for size in SIZES:
        for index in range(seeds):
            common = rng.normal(scale=shared)
            for name, (floor, scale, exponent) in laws.items():
                loss = (floor + scale * size**-exponent) * math.exp(common + rng.normal(scale=noise))
                points.append(ScalingPoint(name, size, 8e6, loss, index))
    return points


def equivalence(result: ScalingResult, form: str, given: str, size: float) -> Equivalence:
    rows = result.forms[form].equivalences
    return next(row for row in rows if row.given == given and row.size == size)


def test_the_papers_points_give_the_papers_equivalences_and_depend_on_the_form() -> None:
    result = fit_scaling("figure3a", at=(6.8e9, 13.1e9))
    assert equivalence(result, "floor", "diff_v1", 6.8e9).equal.value == pytest.approx(10.9e9, abs=0.15e9)
    assert equivalence(result, "floor", "softmax", 13.1e9).equal.value == pytest.approx(7.8e9, abs=0.15e9)
    assert equivalence(result, "power", "diff_v1", 6.8e9).equal.value == pytest.approx(9.1e9, abs=0.15e9)
    row = equivalence(result, "floor", "diff_v1", 6.8e9)
    assert row.equal.low < 9.2e9
    assert row.equal.high > 20e9
    assert row.ratio.value == pytest.approx(6.8e9 / row.equal.value)
    assert row.ratio.low == pytest.approx(6.8e9 / row.equal.high)
    assert not row.extrapolated
    # Five points and three numbers, with the spread four: nothing is left for the correction of AIC.
    assert result.forms["floor"].variants["softmax"].aicc is None
    assert result.forms["power"].variants["softmax"].aicc is not None


def test_planted_exponents_lie_in_their_own_intervals() -> None:
    ladders = 100
    held = dict.fromkeys(("α", "E", "power", "ratio"), 0)
    straight = dict.fromkeys(PLANTED, (1e-9, 8.0, 0.06))
    planted_ratio = (39.0 / 40.0) ** (1 / 0.26)
    for seed in range(ladders):
        result = fit_scaling(ladder(seed), bootstrap=200, seed=seed, at=(1.2e6,))
        fitted = result.forms["floor"].variants["softmax"].parameters
        held["α"] += fitted["α"].low <= 0.26 <= fitted["α"].high
        held["E"] += fitted["E"].low <= 1.9 <= fitted["E"].high
        ratio = result.forms["floor"].equivalences[0].ratio
        held["ratio"] += ratio.low <= planted_ratio <= ratio.high
        # This form alone: the one with a floor takes five times as long for points that have none.
        curves = module._curves(*check_points(ladder(seed, laws=straight)))
        fitted = module._fit(POWER, curves, 200, seed)["softmax"].summary().parameters
        held["power"] += fitted["α"].low <= 0.06 <= fitted["α"].high
    assert all(count >= 90 for count in held.values()), held
    # An interval that is always wide enough says nothing: for the exponents some have to miss.
    assert held["power"] < ladders


def test_every_draw_of_a_bootstrap_ends_where_a_fit_with_all_starts_ends() -> None:
    """Also from a curve whose floor is 0, where one start would find no slope towards a floor."""
    points = [p for p in ladder(1, laws={"softmax": (1e-9, 12.0, 0.12)}) if p.attention == "softmax"]
    x = np.log([[point.size] for point in points])
    x -= x.mean()
    theta = fit_form(FLOOR, x, np.log([point.val_loss for point in points]))
    y = FLOOR.log_loss(theta, x) + np.random.default_rng(0).normal(scale=0.005, size=(40, len(x)))

    def cost(ends: np.ndarray) -> np.ndarray:
        return huber(FLOOR.log_loss(ends, x) - y).sum(-1)

    best = cost(np.stack([fit_form(FLOOR, x, losses) for losses in y]))
    assert np.exp(theta[0]) < 0.1
    assert (cost(refit(FLOOR, x, y, theta)) <= best * 1.01).all()
    assert (cost(refine(FLOOR, x, y, np.broadcast_to(theta, (40, 3)))) > best * 1.01).mean() > 0.1


def test_laws_without_noise_are_equal_not_better_by_a_rounding() -> None:
    same = fit_scaling(ladder(0, noise=0, shared=0, laws=dict.fromkeys(("softmax", "diff_v1"), PLANTED["softmax"])))
    for form in same.forms.values():
        assert all("no difference seen" in row.words for row in form.equivalences)


def test_a_loss_just_below_the_floor_is_no_advantage_where_the_interval_includes_1() -> None:
    same = dict.fromkeys(("softmax", "diff_v1"), PLANTED["softmax"])
    told = [row for seed in range(4) for row in fit_scaling(ladder(seed, laws=same), at=(1e12,), bootstrap=100)
            .forms["floor"].equivalences if row.equal.value is None]  # fmt: skip
    assert told
    for row in told:
        low, high = row.ratio.low, row.ratio.high
        assert low <= 1 <= (math.inf if high is None else high)
        assert "reaches this loss; but the interval includes 1: no difference seen" in row.words


def test_losses_that_do_not_fall_are_refused() -> None:
    rising = [ScalingPoint(p.attention, p.size, p.tokens, 9 / p.val_loss, p.seed) for p in ladder(0)]
    with pytest.raises(DataError, match="losses of softmax do not fall with size") as caught:
        fit_scaling(rising)
    assert "\n" not in str(caught.value)


def test_equal_variants_are_said_to_be_equal_and_better_ones_better() -> None:
    same = fit_scaling(ladder(3, laws={"softmax": PLANTED["softmax"], "diff_v2": PLANTED["softmax"]}), at=(1.2e6,))
    for form in same.forms.values():
        assert form.equivalences[0].words == "the interval includes 1: no difference seen"
    laws = {"softmax": PLANTED["softmax"], "diff_v1": (1.9, 30.0, 0.26)}
    better = fit_scaling(ladder(3, laws=laws), at=(0.55e6,))
    assert equivalence(better, "floor", "diff_v1", 0.55e6).words == "diff_v1 needs fewer parameters"
    worse = fit_scaling(ladder(3, laws={"softmax": laws["diff_v1"], "diff_v1": laws["softmax"]}), at=(1.9e6,))
    assert equivalence(worse, "floor", "diff_v1", 1.9e6).words == "diff_v1 needs more parameters"
    assert equivalence(worse, "power", "softmax", 1.9e6).words.startswith("diff_v1 needs more parameters")


def test_seeds_are_drawn_for_all_variants_together() -> None:
    paired = fit_scaling(ladder(5, noise=1e-4, shared=0.01), at=(1.2e6,))
    # The same losses with other seeds' names: nothing tells any more which belong together.
    loose = [
        point
        if point.attention == "softmax"
        else ScalingPoint(point.attention, point.size, 8e6, point.val_loss, 9 - point.seed)
        for point in ladder(5, noise=1e-4, shared=0.01)
    ]
    apart = fit_scaling(loose, at=(1.2e6,))

    def width(result: ScalingResult) -> float:
        ratio = equivalence(result, "floor", "diff_v1", 1.2e6).ratio
        return ratio.high - ratio.low

    assert width(paired) < 0.3 * width(apart)


def test_a_loss_below_the_floor_has_no_equal_and_extrapolation_is_said() -> None:
    laws = {"softmax": (2.5, 40.0, 0.3), "diff_v1": (1.5, 40.0, 0.3)}
    result = fit_scaling(ladder(1, laws=laws, noise=1e-3), at=(4.2e6, 1e12))
    row = equivalence(result, "floor", "diff_v1", 4.2e6)
    assert row.equal.value is None
    assert row.words == "no number of parameters of softmax reaches this loss, extrapolated"
    assert equivalence(result, "power", "softmax", 1e12).extrapolated


def test_tokens_alone_and_both_axes() -> None:
    rng = np.random.default_rng(0)

    def loss(size: float, tokens: float, gain: float) -> float:
        return (1.8 + gain * 30 * size**-0.25 + 50 * tokens**-0.28) * math.exp(rng.normal(scale=5e-4))

    both = [
        ScalingPoint(name, size, tokens, loss(size, tokens, gain), 0)
        for size in (1e6, 4e6, 16e6, 64e6)
        for tokens in (1e7, 4e7, 16e7)
        for name, gain in (("softmax", 1.0), ("diff_v1", 0.95))
    ]
    result = fit_scaling(both, at=(16e6,))
    assert list(result.forms) == ["joint"]
    fitted = result.forms["joint"].variants["softmax"].parameters
    for name, planted in {"α": 0.25, "β": 0.28, "E": 1.8}.items():
        assert fitted[name].low <= planted <= fitted[name].high, name
    ratio = equivalence(result, "joint", "diff_v1", 16e6).ratio
    assert ratio.low <= 0.95**4 <= ratio.high
    tokens = [ScalingPoint(point.attention, 16e6, point.tokens, point.val_loss, index % 2)
              for index, point in enumerate(both) if point.size in (16e6, 64e6)]  # fmt: skip
    tokens = [ScalingPoint(p.attention, 16e6, p.tokens, p.val_loss, i // 2 % 6 // 3) for i, p in enumerate(tokens)]
    only = fit_scaling(tokens, at=(4e7,))
    assert only.axis == "tokens"
    assert only.forms["floor"].formula == "E + A·T^−α"
    assert "tokens" in only.forms["power"].equivalences[0].words + only.axis


@pytest.mark.parametrize("form", [POWER, FLOOR, JOINT], ids=lambda form: form.name)
def test_gradients_and_numbers_of_every_form(form) -> None:
    rng = np.random.default_rng(4)
    x, theta = rng.normal(size=(7, form.axes)), rng.normal(size=len(form.names)) * 0.3
    step = 1e-6
    for index in range(len(theta)):
        moved = theta.copy()
        moved[index] += step
        numeric = (form.log_loss(moved, x) - form.log_loss(theta, x)) / step
        assert form.gradient(theta, x)[:, index] == pytest.approx(numeric, abs=1e-4)
    centre = rng.normal(size=form.axes) + 10
    values = dict(zip(form.names, form.numbers(theta, centre), strict=True))
    sizes = np.exp(x + centre)
    loss = values.get("E", 0.0) + values["A"] * sizes[:, 0] ** -values["α"]
    if "B" in values:
        loss = loss + values["B"] * sizes[:, 1] ** -values["β"]
    assert form.log_loss(theta, x) == pytest.approx(np.log(loss))


def test_hubers_loss_lets_one_bad_run_go() -> None:
    points = [point for point in ladder(2, noise=1e-4, shared=0) if point.attention == "softmax"]
    x = np.log([[point.size] for point in points])
    centre = x.mean()
    y = np.log([point.val_loss for point in points])
    y[4] += 0.3
    robust = fit_form(FLOOR, x - centre, y)
    squares = refine(FLOOR, x - centre, y[None], robust[None], bend=np.inf)[0]
    off = {name: abs(FLOOR.numbers(theta, np.array([centre]))[2] - 0.26) for name, theta in
           {"robust": robust, "squares": squares}.items()}  # fmt: skip
    assert off["robust"] < 0.2 * off["squares"]
    assert huber(np.array([0.0, 0.005, 0.02])).tolist() == pytest.approx([0.0, 1.25e-5, 1.5e-4])


def test_an_interval_moves_away_from_the_estimate_by_the_factor() -> None:
    draws = np.exp(np.linspace(-1, 1, 2001))
    low, high = interval(1.0, draws, 2.0)
    assert (math.log(low), math.log(high)) == pytest.approx((-1.9, 1.9), abs=0.01)
    assert interval(1.0, np.append(draws, [math.inf] * 200), 1.0)[1] is None


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "only nothing given"),
        ([p for p in read_points("figure3a") if p.attention == "softmax"], "only softmax given"),
        ([p for p in read_points("figure3a") if p.attention != "softmax"], "only diff_v1 given"),
        (read_points("figure3a")[:6], "3 points of softmax at 3 sizes given"),
        (read_points("figure3a") + read_points("figure3a")[:1], "stands there twice"),
        ([ScalingPoint(a, 1e6, 1e6, 3.0, s) for a in ("softmax", "diff_v1") for s in range(5)], "same size and tokens"),
        (
            [ScalingPoint(a, x, 1e6, 3.0, s) for a in ("softmax", "diff_v1") for x in (1e6, 2e6) for s in range(5)],
            "2 sizes",
        ),
        ([*read_points("figure3a"), ScalingPoint("softmax", 1e9, 1e9, 3.0)], "some rows give tokens and some do not"),
    ],
)
def test_points_that_no_curve_goes_through_are_one_line(points: list[ScalingPoint], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        fit_scaling(points)
    assert "\n" not in str(caught.value)


def test_bad_options_are_one_line() -> None:
    for options in ({"bootstrap": 10}, {"at": (0.0,)}, {"size": "width"}):
        with pytest.raises(ConfigError, match="wanted"):
            fit_scaling("figure3a", **options)

"""A comparison that never ran: three variants whose numbers are all different, so that none hides another."""

import math
import random

from diffattn.results.comparison import ComparisonResult, CurvePoint, LossCurve, PairResult, VariantResult
from diffattn.results.interval import Interval
from diffattn.results.maps import AttentionMaps, HeadMaps

SENTENCE = "Fellow citizens, I am again called upon by the voice of my country to execute the functions of its Chief."
PAIRS = ("diff_v1", "diff_v2")


def comparison(seeds: int = 2) -> ComparisonResult:
    """A result of `compare`: the first pair differs, the second does not; one seed has no interval."""
    shift = {"softmax": 0.0, "diff_v1": -0.021, "diff_v2": -0.004}
    variants = {
        name: VariantResult(
            parameters=3_021_312 + 1_253 * place,
            attention_parameters=1_048_576 + 1_253 * place,
            intermediate_size=688 - 43 * place,
            val_loss=[3.412 + shift[name] + 0.0137 * seed + 0.002 * place * (1 - 2 * seed) for seed in range(seeds)],
            bits_per_byte=[1.623 + shift[name] / 2 + 0.0071 * seed for seed in range(seeds)],
            train_tokens_per_second=41_234.5 - 3_456.7 * place,
            train_peak_bytes=512_345_678 + 34_567_890 * place,
            cache_bytes_per_token=1228.8,
            model_flops_per_token=12_345_678 + 234_567 * place,
            executed_flops_per_token=12_345_678 + 1_345_678 * place,
            checkpoint_bytes=12_130_456 + 5_012 * place,
            load_seconds=0.1234 + 0.0101 * place,
            first_token_seconds=0.0351 + 0.0023 * place,
            attention_backend="fused_cpu",
        )
        for place, name in enumerate(shift)
    }
    intervals = {"diff_v1": (-0.0254, -0.0166), "diff_v2": (-0.0193, 0.0113)}
    verdicts = {
        "diff_v1": "diff_v1: lower loss than softmax (−0.0210 nats per token, 95% interval −0.0254 to −0.0166)",
        "diff_v2": "diff_v2: no difference seen (−0.0040 nats per token, 95% interval −0.0193 to +0.0113)",
    }
    pairs = {}
    for name in PAIRS:
        low, high = intervals[name] if seeds > 1 else (None, None)
        verdict = verdicts[name] if seeds > 1 else f"{name}: one seed, no interval, so nothing is claimed"
        difference = Interval(shift[name], low, high)
        pairs[name] = PairResult(val_loss_difference=difference, verdict=verdict, parameters_ratio=1.0004)
    return ComparisonResult(
        variants=variants,
        pairs=pairs,
        recipe={"steps": 1500, "optimizer": {"name": "adamw", "betas": [0.9, 0.95], "lr": 0.001}},
        versions={"diffattn": "0.1.0", "torch": "2.13.0"},
        data={"train_tokens": 1_234_567, "tokenizer": "byte-level BPE, 4096", "sha256": "ab12" * 16},
        seeds=list(range(seeds)),
        command="diffattn compare --text 'speeches & letters' --seeds 2",
    )


def loss_curves(seeds: int = 2, steps: int = 1500) -> list[LossCurve]:
    """Curves that fall from 8.3 to about 3.4, with noise, one point per step."""
    curves = []
    for place, name in enumerate(("softmax", *PAIRS)):
        for seed in range(seeds):
            chance = random.Random(97 * place + seed)

            def at(step: int, place: int = place, seed: int = seed) -> float:
                return 3.3 + 5 * math.exp(-step / 120) + 6 / (step + 30) - 0.03 * place + 0.02 * seed

            train = [CurvePoint(1024 * s, at(s) + chance.gauss(0, 0.08)) for s in range(1, steps + 1)]
            held = [CurvePoint(1024 * s, at(s) + 0.1) for s in range(0, steps + 1, max(1, steps // 10))]
            curves.append(LossCurve(attention=name, seed=seed, train=train, validation=held))
    return curves


def head_maps(tokens: list[str] | None = None) -> HeadMaps:
    """Maps of one head; rows of the softmax maps sum to 1, as real ones do."""
    tokens = tokens or [word for part in SENTENCE.split() for word in (part[:7], part[7:]) if word] + [" ", "\n", "$x$"]
    chance = random.Random(11)

    def softmax_map() -> list[list[float]]:
        rows = []
        for row in range(len(tokens)):
            scores = [math.exp(1.2 * chance.gauss(0, 1) + (2 if k == 0 else 0) + (k == row)) for k in range(row + 1)]
            rows.append([s / sum(scores) for s in scores] + [0.0] * (len(tokens) - row - 1))
        return rows

    def differential(lam: float | list[float]) -> AttentionMaps:
        by_row = lam if isinstance(lam, list) else [lam] * len(tokens)
        positive = softmax_map()
        negative = [
            [by_row[t] * (0.7 * a + 0.3 * b) for a, b in zip(p, n, strict=True)]
            for t, (p, n) in enumerate(zip(positive, softmax_map(), strict=True))
        ]
        difference = [[a - b for a, b in zip(p, n, strict=True)] for p, n in zip(positive, negative, strict=True)]
        return AttentionMaps(map_pos=positive, lam_map_neg=negative, map_diff=difference, lam=lam)

    by_token = [0.21 + 0.37 * chance.random() for _ in tokens]
    variants = {
        "softmax": AttentionMaps(map_pos=softmax_map()),
        "diff_v1": differential(0.3555),
        "diff_v2": differential(by_token),
    }
    return HeadMaps(text=SENTENCE, tokens=tokens, layer=2, head=0, variants=variants)

"""Runs the Triton kernels in the interpreter and prints, for each case, a JSON line of relative errors against float64.

A process of its own: `TRITON_INTERPRET` must be set before the kernels are imported. Needs torch and Triton alone.

    TRITON_INTERPRET=1 python tests/ops/triton/interpreted.py

With `--sweep` behind it, noise heads that are shared in every way and under every mask, which takes minutes.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from mutants import MUTATIONS, mutant
from support.triton_cases import (
    ALLOWED,
    BF16,
    F16,
    Blocks,
    Form,
    Kernels,
    Problem,
    Walk,
    alike,
    decoded,
    definition,
    errors,
    far,
    lam_of,
    make_problem,
    misaligned,
    normed,
    of_cache,
    one_projection,
    package_kernels,
    relative,
    results,
)  # fmt: skip

from benchmarks.interpreter import last_programs, mend_interpreter

# Forms of the kernels: blocks of 16, so that small shapes cross them.
SMALL, APART, DESCRIBED = Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2, together=False), Blocks(16, 16, 4, 2, True, True)
TOGETHER = Form(SMALL, (SMALL, (Walk(SMALL),)))
FORMS = {
    "": TOGETHER,
    "apart": Form(APART, (SMALL, (Walk(SMALL, makes_v=False), Walk(SMALL, makes_k=False)))),
    "described": Form(DESCRIBED, (DESCRIBED, (Walk(DESCRIBED),))),
}
V2, LONGER = {"one_key": True}, {"T": 21, "S": 43}
# Name, form of the kernels, arguments of `make_problem`.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((f"V{1 + one_key}", form, {"T": 37, "one_key": one_key}) for one_key in (False, True) for form in FORMS),
    ("T < S", "", LONGER),
    ("not causal, T < S", "", {**LONGER, "causal": False}),
    ("not causal, T > S", "apart", {"T": 43, "S": 21, "causal": False}),
    ("padded", "", {"T": 37, "padded": True}),
    ("padded, T < S, V2", "", {"T": 5, "S": 43, "padded": True, **V2}),
    ("padded, not causal", "apart", {"T": 19, "S": 37, "padded": True, "causal": False}),
    # A block of queries that sees no key, keys that no query sees, and queries that begin again within a block.
    ("packed", "", {"sequences": (5, -31, 1, 14)}),
    ("packed, V2", "described", {"sequences": (-18, 11, 12), **V2}),
    ("static cache", "", {"T": 3, "S": 43, "written": 24}),
    ("static cache, V2", "apart", {"T": 18, "S": 43, "written": 21, **V2}),
    ("groups", "", {"T": 19, "H": 4, "G": 2}),
    ("groups, packed, V2", "", {"H": 6, "G": 2, "sequences": (9, 10), **V2}),
    ("no groups", "", {"T": 19, "H": 3, "G": 3}),
    ("odd widths", "", {"T": 23, "D": 11, "Dv": 37}),
    ("odd widths, described", "described", {"T": 23, "D": 24, "Dv": 40}),
    *((f"width {d}", "", {"B": 1, "T": 18, "H": 1, "D": d, "Dv": 2 * d}) for d in (64, 80, 128)),
    *((f"width {d}, V2", "", {"B": 1, "T": 18, "H": 1, "D": d, "Dv": d, **V2}) for d in (32, 96, 200)),
    ("width 256", "apart", {"B": 1, "T": 18, "H": 1, "D": 256, "Dv": 256}),
    ("scale", "", {"T": 19, "scale": 0.9}),
    ("λ below 0", "", {"T": 19, "change": lam_of(lambda lam: -lam)}),
    ("λ is 0", "", {"T": 19, "change": lam_of(torch.zeros_like)}),
    ("λ above 1", "apart", {"T": 19, "change": lam_of(lambda lam: 1.5 + lam[:, :, :1])}),
    ("λ of a head", "", {"T": 19, **V2, "change": lam_of(lambda lam: lam[0, 0])}),
    ("λ of a layer", "", {"T": 19, "change": lam_of(lambda lam: lam[0, 0, 0])}),
    ("one projection", "", {"T": 19, "change": one_projection}),
    ("one projection, V2", "described", {"T": 19, "change": one_projection, **V2}),
    ("view of a cache", "described", {"T": 5, "S": 27, "change": of_cache}),
    ("misaligned", "described", {"T": 19, "change": misaligned}),
    ("steps of 0", "described", {"T": 19, "change": alike, **V2}),
    ("gradient of a sum", "", {"T": 19, "cotangent": lambda y: y.new_ones(()).expand_as(y)}),
    ("gradient of rows alike", "described", {"T": 19, "cotangent": lambda y: y[:, :1].expand_as(y)}),
    ("gradient transposed", "", {"T": 19, "cotangent": lambda y: y.transpose(1, 3).contiguous().transpose(1, 3)}),
    ("offsets beyond 2³¹", "", {"T": 5, "S": 17, "dtype": F16, "change": far(2**31 + 2**20, 2**12)}),
    ("tokens far apart", "", {"B": 1, "T": 33, "dtype": F16, "change": far(0, 2**27)}),
    ("float16", "", {"T": 37, "dtype": F16}),
    ("bfloat16", "", {"T": 37, "dtype": BF16}),
    ("bfloat16", "apart", {"T": 37, "dtype": BF16}),
    ("bfloat16, V2", "", {"T": 37, "dtype": BF16, **V2}),
    ("no queries", "described", {"T": 0, "S": 5}),
    ("no keys", "", {"T": 3, "S": 0, "causal": False, **V2}),
    ("window", "", {"B": 1, "T": 37, "window": 9}),
    ("window, T < S, V2", "described", {"B": 1, **LONGER, "window": 5, **V2}),
    ("2:1", "", {"T": 19, "H": 4, "noise_heads": 2}),
    ("3:1, groups, V2", "described", {"B": 1, "T": 19, "H": 6, "G": 2, "noise_heads": 2, **V2}),
    ("4:1, padded", "apart", {"T": 19, "H": 4, "noise_heads": 1, "padded": True}),
    ("2:1, not causal, T < S", "apart", {"B": 1, **LONGER, "H": 4, "noise_heads": 2, "causal": False}),
    ("2:1, packed", "described", {"H": 2, "noise_heads": 1, "sequences": (9, -3, 8)}),
    ("2:1, window", "", {"B": 1, "T": 37, "H": 2, "noise_heads": 1, "window": 9}),
    ("2:1, odd widths", "", {"B": 1, "T": 19, "noise_heads": 1, "D": 11, "Dv": 37, "dtype": F16}),
    ("2:1, no queries", "", {"T": 0, "S": 5, "noise_heads": 1}),
]
# Too many for every run.
SWEEP: list[tuple[str, str, dict[str, Any]]] = [
    (
        f"{signals}:1 of {noises} in {groups}, V{1 + one_key}, {mask}",
        form,
        {"B": 1, "H": signals * noises, "noise_heads": noises, "G": groups, "one_key": one_key, **options},
    )
    for signals, noises, groups in ((2, 1, 1), (2, 4, 2), (3, 2, 1), (5, 2, 2))
    for one_key, form in ((False, ""), (True, "apart"), (False, "described"))
    for mask, options in {
        "causal, T < S": LONGER,
        "not causal, T > S": {"T": 43, "S": 21, "causal": False},
        "padded": {"B": 2, "T": 21, "padded": True},
        "packed": {"sequences": (5, -31, 1, 14)},
        "static cache": {"T": 3, "S": 43, "written": 24},
        "window": {"T": 37, "S": 43, "window": 12},
    }.items()
]
# Name, number of spans of keys, form, arguments of `make_problem`.
DECODING: list[tuple[str, int, Any, dict[str, Any]]] = [
    ("1 query", 3, SMALL, {"T": 1, "S": 83}),
    ("1 span", 1, DESCRIBED, {"T": 1, "S": 37}),
    ("5 queries, V2", 2, SMALL, {"T": 5, "S": 43, **V2}),
    ("8 queries of 3 heads", 2, SMALL, {"T": 8, "S": 43, "H": 3}),
    ("not causal", 2, SMALL, {"T": 3, "S": 43, "causal": False}),
    ("padded", 4, SMALL, {"T": 2, "S": 71, "padded": True}),
    ("static cache", 4, DESCRIBED, {"T": 2, "S": 71, "written": 33, "change": of_cache}),
    ("odd widths, one group", 2, SMALL, {"T": 2, "S": 43, "H": 5, "D": 24, "Dv": 40, "dtype": BF16}),
    ("2:1, groups, V2, padded", 3, SMALL, {"T": 2, "S": 43, "H": 8, "G": 2, "noise_heads": 4, "padded": True, **V2}),
    ("4:1, static cache", 2, DESCRIBED, {"T": 3, "S": 71, "H": 8, "noise_heads": 2, "written": 33}),
    ("3:1 of 8 queries", 2, SMALL, {"B": 1, "T": 8, "S": 43, "H": 6, "noise_heads": 2}),
    ("window", 4, SMALL, {"B": 1, "T": 3, "S": 71, "window": 20}),
    ("float16, no queries", 1, SMALL, {"T": 0, "S": 9, "dtype": F16}),
    ("no keys", 1, SMALL, {"T": 2, "S": 0, "causal": False}),
]


def say(name: str, problem: Problem, found: dict[str, float], **more: Any) -> None:
    allowed = ALLOWED[problem.inputs.v.dtype]
    print(json.dumps({"case": name, "allowed": allowed, "errors": found} | more), flush=True)


def training(kernels: Kernels, cases: list[tuple[str, str, dict[str, Any]]]) -> None:
    for name, form, options in cases:
        problem = make_problem(**options)
        got = results(problem, kernels, FORMS[form])
        # Two runs of one form are enough here: programs follow one another.
        again = results(problem, kernels, FORMS[form]) if name in ("V2", "2:1") else got
        same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
        say(f"{name}, {form}" if form else name, problem, errors(got, definition(problem)), same_bits=same)


def few_queries(kernels: Kernels) -> None:
    for name, splits, blocks, options in DECODING:
        problem = make_problem(**options)
        gain = torch.linspace(0.5, 1.5, problem.inputs.v.shape[-1]).to(problem.inputs.v.dtype)
        wide, how = definition(problem)[0], {"splits": splits, "blocks": blocks}
        found = {"output": relative(decoded(problem, kernels, **how), wide)}
        found["normed"] = relative(decoded(problem, kernels, norm=True, **how), normed(wide))
        found["with gain"] = relative(decoded(problem, kernels, norm=True, gain=gain, **how), normed(wide, gain))
        say(f"decoding, {name}", problem, found)


def many_heads(kernels: Kernels) -> None:
    """More programs than a second or third dimension of a grid can count, of which the last run, for the last head."""
    problem = make_problem(B=2, T=3, H=40_000, G=40_000)
    with last_programs(4):
        got = results(problem, kernels, TOGETHER)
    x = problem.inputs
    last = x._replace(**{name: getattr(x, name)[-1:, :, -1:] for name in ("q1", "k1", "q2", "k2", "v", "lam")})
    wanted = definition(Problem(last, problem.cotangent[-1:, :, -1:]))
    say("80,000 heads", problem, errors([y[-1:, :, -1:] for y in got], wanted), unwritten=bool(got[0].isnan().any()))


def skipped(kernels: Kernels) -> None:
    """Keys behind and before every window hold NaN, which a product would spread: their blocks are not computed.

    So are the gradients of rows whose window ends before a block of keys: they reach no gradient of that block.
    """
    for signals in (1, 2):
        problem = make_problem(B=1, T=16, S=96, H=2, noise_heads=2 // signals, window=8)
        x, form = problem.inputs, FORMS["described"]
        wanted = results(problem, kernels, form)
        keys = {name: getattr(x, name).clone() for name in ("k1", "k2", "v")}
        for y in keys.values():
            y[:, :64] = float("nan")
        poisoned = problem._replace(inputs=x._replace(**keys))
        got = results(poisoned, kernels, form)
        same = all(torch.equal(a, b) for a, b in zip(got[:4:3], wanted[:4:3], strict=True))
        few = [y.inputs._replace(q1=x.q1[:, -2:], q2=x.q2[:, -2:], lam=x.lam[:, -2:]) for y in (problem, poisoned)]
        pair = [decoded(problem._replace(inputs=y), kernels, splits=3, blocks=SMALL) for y in few]
        square = make_problem(B=1, T=64, H=2, noise_heads=2 // signals, window=8)
        cotangent = square.cotangent.clone()
        cotangent[:, :32] = float("nan")
        pair += [
            y[:, 32:] for z in (square, square._replace(cotangent=cotangent)) for y in results(z, kernels, form)[5:6]
        ]
        same = same and all(torch.equal(a, b) for a, b in zip(pair[::2], pair[1::2], strict=True))
        say(f"blocks outside of every window, {signals}:1", problem, {}, same_bits=same)


def known_wrong() -> None:
    for name, mutation in MUTATIONS.items():
        problem = make_problem(**mutation.call)
        with mutant(mutation) as kernels:
            say(name, problem, errors(results(problem, kernels, TOGETHER), definition(problem)), known_wrong=True)


def main() -> None:
    mend_interpreter()
    # NumPy's warnings of logarithms of 0, which a row without keys discards.
    warnings.simplefilter("ignore", RuntimeWarning)
    # Fills what is allocated with NaN: an output that nobody writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    kernels = package_kernels()
    if sys.argv[1:] == ["--sweep"]:
        training(kernels, SWEEP)
        return
    training(kernels, CASES)
    few_queries(kernels)
    skipped(kernels)
    many_heads(kernels)
    known_wrong()


if __name__ == "__main__":
    main()

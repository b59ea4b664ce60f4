"""The planner's FLOPs and bytes of the one attention call, against the rows that were measured on two GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffattn.plan.activations import layer, norm
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

# Behind diffattn, of which it would else import the modules alone.
from benchmarks import gpu_cases  # isort: skip

RESULTS = Path(gpu_cases.__file__).with_name("results")
# The case of a row, without the kernel that served it, and what the planner calls it.
FORMS = {
    "softmax": ("softmax", "standard"),
    "v1_padded": ("diff_v1", "standard"),
    "v1_unequal": ("diff_v1", "unequal"),
    "v1_fused": ("diff_v1", "fused_triton"),
    "v2_standard": ("diff_v2", "standard"),
    "v2_fused": ("diff_v2", "fused_triton"),
}


def timings(card: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (RESULTS / f"gpu_{card}.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["what"] == "timing" and "extra_peak_bytes" in row]


def extra_bytes(attention: str, backend: str, problem: gpu_cases.Problem) -> int:
    """Bytes of both passes of the call beyond its inputs and the gradient of its output, as the benchmark makes it."""
    variant, d, n = VARIANTS[attention], problem.width, problem.heads
    shape = ModelShape(
        hidden_size=n * d, num_layers=1, num_heads=n, num_kv_heads=problem.groups, head_dim=d, intermediate_size=1,
        vocab_size=1,
    )  # fmt: skip
    one = layer(shape, attention, backend=backend, size=2, autocast=False, gpu=True)
    found = one.attention - one.behind - norm(n * d, 2, False, variant.readers) + one.in_attention - 2 * n * d
    subtracted = variant.maps > 1 and backend != "fused_triton"
    # q, k and v are inputs, and so is λ; a padded or reordered q is a copy beside the input.
    copied = variant.pads_queries and (backend == "standard" or (backend == "unequal" and problem.groups < n))
    found -= 2 * (2 * problem.groups * d + (0 if copied else variant.query_width(shape)))
    found -= 4 * n if variant.weights == "head" else 0
    # The call's own result is an intermediate one where maps are subtracted behind it; the output is held, and λ's
    # gradient is made.
    found += 2 * n * d + 4 * variant.output_heads(shape) if subtracted else -2 * n * d
    return found * problem.batch * problem.queries


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_memory_is_what_was_measured(card: str) -> None:
    """Within 1 MiB and some rounding, of 116 to 1220 MiB: so much the allocator may give out beyond what is asked for,
    and cuDNN takes more than FlashAttention-2. Another form of the same attention is much further away.
    """
    seen = set()
    for row in timings(card):
        form, kernel = row["case"].rsplit("_", 1)
        if row["phase"] != "forward_backward" or form not in FORMS or kernel == "efficient":
            continue
        problem = gpu_cases.Problem(**row["problem"])
        measured = row["extra_peak_bytes"]
        predicted = extra_bytes(*FORMS[form], problem)
        assert predicted == pytest.approx(measured, rel=0, abs=2**20 + 2**12), row["case"]
        for wrong in FORMS.values():
            if wrong != FORMS[form] and wrong[0] == FORMS[form][0]:
                assert abs(extra_bytes(*wrong, problem) - measured) > 2**24
        seen.add((form, problem.width, problem.groups))
    assert seen >= {(form, width, groups) for form in FORMS for width in (64, 128) for groups in (4, 16)}


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_executed_flops_of_the_rows_are_those_of_the_variants(card: str) -> None:
    rows = timings(card)
    assert {row["problem"]["width"] for row in rows} == {64, 128}
    for row in rows:
        way = row["case"].rsplit("_", 1)[0]
        problem = gpu_cases.Problem(**row["problem"])
        found = gpu_cases.executed_flops(way, problem, backward=row["phase"] == "forward_backward")
        assert found == row["executed_flops"], row["case"]

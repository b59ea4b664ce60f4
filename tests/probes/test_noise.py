"""Where the last token looks, against sums over whole maps; and that no whole map is made."""

import numpy as np
import pytest
import torch
from support.needle_model import VOCABULARY, haystack, reader

from diffattn.errors import ConfigError
from diffattn.probes import attention_calls
from diffattn.probes.attention_calls import served_by
from diffattn.probes.noise import SPANS, NoiseOptions, measure_noise, span_sums

MODELS = ("softmax", "diff_v1", "diff_v2", "dex", "llama")
HAY = haystack()


def prompts(count: int, length: int = 300):
    return [
        HAY.prompt(np.random.default_rng(seed), length=length, depth=depth)
        for seed, depth in zip(range(count), np.linspace(0, 1, count), strict=True)
    ]


@pytest.mark.parametrize("attention", MODELS)
def test_spans_are_sums_of_the_last_row_of_whole_maps(attention):
    model, batch = reader(attention), prompts(3)
    sums = span_sums(model, batch)
    calls = []
    with served_by(model, calls.append), torch.no_grad():
        model(input_ids=torch.tensor([prompt.ids for prompt in batch]))
    names = ("map_pos", "map_neg", "map_diff") if attention in ("diff_v1", "diff_v2") else ("map_pos",)
    assert tuple(sums) == names
    for layer, call in enumerate(calls):
        maps = [*call.maps(range(300)), call.map_diff(range(300))]
        for name, weights in zip(names, maps, strict=False):
            for index, prompt in enumerate(batch):
                expected = [weights[index, :, -1, slice(*prompt.spans[span])].sum(-1) for span in SPANS]
                torch.testing.assert_close(
                    sums[name][index, layer].float(), torch.stack(expected, -1), rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("attention", MODELS)
def test_shares_are_means_over_heads_divided_by_what_all_spans_have(attention):
    options = NoiseOptions(length=300, depths=(0.0, 1.0), samples=3, batch_size=2)
    seen, model = [], reader(attention)
    result = measure_noise(model, HAY, options, on_progress=lambda *progress: seen.append(progress))
    assert seen == [(2, 6), (4, 6), (6, 6)]
    asked = [
        HAY.prompt(np.random.default_rng((0, index, sample)), length=300, depth=depth)
        for index, depth in enumerate(options.depths)
        for sample in range(3)
    ]
    sums = span_sums(model, asked)
    assert result.keys() == sums.keys()
    for name, entry in result.items():
        totals = sums[name].flatten(1, 2).sum(1).unflatten(0, (2, 3))
        shares = torch.tensor(entry.shares)
        torch.testing.assert_close(shares, (totals / totals.sum(-1)[..., None]).float(), rtol=0, atol=1e-5)
        # Nothing lies before a needle at the beginning, nothing behind one at the end.
        assert shares[0, :, SPANS.index("before")].abs().max() == 0
        assert shares[1, :, SPANS.index("behind")].abs().max() == 0
        assert shares[0, :, SPANS.index("behind")].abs().min() > 0
        assert torch.tensor(entry.by_head["answer"]).isfinite().all()


def test_a_head_that_looks_at_the_answer_alone_has_no_noise(monkeypatch):
    """Attention to one token of the needle, put there by hand, is what the study reports."""
    model, batch = reader("softmax"), prompts(2)
    wanted = torch.tensor([prompt.spans["answer"][0] for prompt in batch])

    class Pointing:
        def __init__(self, call):
            self.queries, self.heads, self.layer = call.queries, call.heads, call.layer

        def maps(self, rows):
            weights = torch.zeros(2, self.heads, 1, 300)
            weights[torch.arange(2), :, 0, wanted] = 1.0
            return (weights,)

        def lam_of(self, rows):
            return None

    monkeypatch.setattr(
        attention_calls, "served_by", lambda model, read: served_by(model, lambda call: read(Pointing(call)))
    )
    sums = span_sums(model, batch)["map_pos"]
    assert (sums[..., SPANS.index("answer")] == 1).all()
    assert sums.sum() == sums[..., SPANS.index("answer")].sum()


def test_memory_at_8192_tokens_is_far_from_a_map_of_all_heads():
    """One float32 map of all 12 heads would be 3.2 GB; what is alive at once is measured by torch's own allocator."""
    from torch.profiler import ProfilerActivity, profile

    model = reader("diff_v2", num_layers=1)
    ids = torch.randint(2, VOCABULARY, (1, 8192), generator=torch.Generator().manual_seed(0))
    prompt = prompts(1)[0]
    long = type(prompt)(ids[0].tolist(), {"bos": (0, 1), "before": (1, 9), "answer": (9, 20), "behind": (20, 8000),
                                          "query": (8000, 8192)}, ("1",))  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        span_sums(model, [long])
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0 < peak < 200e6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"depths": ()}, "depths is empty"),
        ({"length": 8193}, "wanted at most 8192, the model's max_position_embeddings"),
        ({"length": 20}, "a length of at least 47"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        measure_noise(reader("diff_v1"), HAY, NoiseOptions(**options))

"""The fused implementation with caches, in generate and its engine, and in graphs."""

import dataclasses

import pytest
import torch
from support.fused_cases import needs_the_kernel
from support.kernel_calls import recorded_calls
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from diffattn.model.fused import DIFF_FUSED

DIFFERENTIAL = ("diff_v1", "diff_v2", "diff_gda")
COMPILED = ("diff_v1", "diff_v2", pytest.param("diff_gda", marks=pytest.mark.full))
LENGTH = 13
MAX_LENGTH = 17
PADDING = (0, 3, 7)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return recorded_calls(monkeypatch)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def left_padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids * mask, mask


def new_cache(kind: str, config):
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=MAX_LENGTH)


ORDERS = {
    "fused throughout": (DIFF_FUSED, DIFF_FUSED),
    "fused after sdpa": ("sdpa", DIFF_FUSED),
    "sdpa after fused": (DIFF_FUSED, "sdpa"),
}


@needs_the_kernel
@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (5, 1, 4, 3), (12, 1)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", DIFFERENTIAL)
@torch.no_grad()
def test_cached_decoding_gives_the_full_forwards_logits(attention, kind, order, chunks, served):
    model = small_model(attention, attn_implementation="sdpa")
    ids, mask = left_padded(tokens(3, LENGTH))
    for attention_mask in (None, mask):
        model.set_attn_implementation("sdpa")
        expected = model(ids, attention_mask=attention_mask, use_cache=False).logits
        cache, seen, pieces = new_cache(kind, model.config), 0, []
        for chunk in ids.split(chunks, dim=1):
            model.set_attn_implementation(ORDERS[order][seen > 0])
            seen += chunk.shape[1]
            so_far = None if attention_mask is None else attention_mask[:, :seen]
            pieces.append(model(chunk, attention_mask=so_far, past_key_values=cache).logits)
        for row, padding in enumerate(PADDING):
            start = 0 if attention_mask is None else padding
            assert_same_logits(torch.cat(pieces, dim=1)[row, start:], expected[row, start:])
        # The comparison is one: without its context the last chunk is far off.
        assert (model(ids[:, -chunks[-1] :]).logits[0, -1] - expected[0, -1]).abs().max() > 0.1
    assert set(served) == {"kernel"}


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 4},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
    "prefill in chunks": {"prefill_chunk_size": 4},
}


@needs_the_kernel
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_generated_tokens_of_a_padded_batch_are_those_of_sdpa(attention, way, served):
    model = small_model(attention)
    ids, mask = left_padded(tokens(3, LENGTH))
    fused = generate(model, ids, attention_mask=mask, **WAYS[way])
    assert set(served) == {"kernel"}
    model.set_attn_implementation("sdpa")
    assert torch.equal(fused, generate(model, ids, attention_mask=mask, **WAYS[way]))


@needs_the_kernel
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_assisted_decoding_gives_the_same_tokens(attention, served):
    model, ids = small_model(attention), tokens(1, LENGTH).repeat(1, 2)
    expected = generate(model, ids)
    draft = small_model(attention, shape=dataclasses.replace(SHAPE, num_layers=1))
    assert torch.equal(generate(model, ids, assistant_model=draft), expected)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)
    assert set(served) == {"kernel"}


@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_continuous_batching_runs_the_standard_call_and_gives_the_same_tokens(attention, served):
    model = small_model(attention)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 7)]
    alone = [generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    served.clear()
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=-1)
    # Small, since the engine would fill what memory there is; and 8 tokens at a time split the longest prompt.
    engine = ContinuousBatchingConfig(page_size=4, num_blocks=24, max_batch_tokens=8)
    for _ in range(2):
        results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=engine)
        assert [result.generated_tokens for result in results.values()] == alone
        assert served == []
        assert model.config._attn_implementation == DIFF_FUSED


def test_an_engine_that_does_not_start_leaves_the_implementation_as_it_was():
    model = small_model("diff_v1")
    with pytest.raises(AttributeError):
        model.init_continuous_batching(continuous_batching_config="none")
    assert model.config._attn_implementation == DIFF_FUSED


def kernels(graph: torch.fx.GraphModule) -> int:
    return sum("diffattn.fused_cpu" in str(node.target) for node in graph.graph.nodes)


# The compiler's own modules meet what this version of torch has retired.
@needs_the_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("attention", COMPILED)
def test_training_step_compiles_into_one_graph_with_the_kernel_in_it(attention, padding):
    from torch._dynamo.backends.debugging import aot_eager

    model = small_model(attention, shape=dataclasses.replace(SHAPE, num_layers=2)).train()
    ids, mask = left_padded(tokens(3, LENGTH))
    labels = torch.where(mask.bool(), ids, -100)
    graphs = []

    def counting(graph, inputs, **options):
        graphs.append(kernels(graph))
        return aot_eager(graph, inputs, **options)

    steps = []
    for call in (model, torch.compile(model, fullgraph=True, backend=counting)):
        outputs = call(input_ids=ids, attention_mask=mask if padding else None, labels=labels, use_cache=False)
        steps.append([outputs.logits, *torch.autograd.grad(outputs.loss, list(model.parameters()))])
    assert graphs == [2]
    for actual, expected in zip(*steps, strict=True):
        assert_same_logits(actual, expected)


@needs_the_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("attention", COMPILED)
@torch.no_grad()
def test_decoding_with_a_static_cache_is_one_graph_for_every_position(attention):
    model, ids = small_model(attention), tokens(2, 9)
    graphs = []

    def counting(graph, _):
        graphs.append(kernels(graph))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    cache = StaticCache(config=model.config, max_cache_len=11)
    pieces = [model(ids[:, :4], past_key_values=cache).logits]
    for position in range(4, 9):
        pieces.append(compiled(ids[:, position : position + 1], past_key_values=cache).logits)
    assert graphs == [SHAPE.num_layers]
    assert_same_logits(torch.cat(pieces, dim=1), model(ids).logits)


@needs_the_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("attention", COMPILED)
@torch.no_grad()
def test_export_gives_a_program_for_every_batch_and_length(attention, padding):
    model = small_model(attention, use_cache=False)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)

    def given(ids, mask):
        return {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}

    ids, mask = left_padded(tokens(3, LENGTH))
    sizes = {name: {0: batch, 1: length} for name in given(ids, mask)}
    program = torch.export.export(model, (), given(ids, mask), dynamic_shapes=sizes, strict=False)
    assert kernels(program) == SHAPE.num_layers
    ids, mask = tokens(5, 9, seed=3), torch.ones(5, 9, dtype=torch.long)
    mask[1, :2] = 0
    actual, expected = (call(**given(ids, mask)).logits for call in (program.module(), model))
    valid = mask.bool() if padding else torch.ones_like(mask).bool()
    assert_same_logits(actual[valid], expected[valid])

"""Models in half precision where the processor does not multiply it: the same model, in float32 where that is fast."""

import pytest
import torch
from support.comparison import compare
from support.small_models import small_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from diffattn.ops import half
from diffattn.ops.cpu import build
from diffattn.variants import ATTENTIONS

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor multiplied neither, and had no compiled kernel."""
    monkeypatch.setattr(half, "is_slow", lambda dtype: True)
    monkeypatch.setattr(build, "unavailable", lambda dtype: "fused_cpu: switched off")


class Products(TorchDispatchMode):
    """Holds the name, dtype and number of rows or queries of every matrix product and attention that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[str, torch.dtype, int]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            x = args[name == "addmm"]
            self.made.add(("linear", x.dtype, x.shape[0]))
        elif "scaled_dot_product" in name:
            self.made.add(("attention", args[0].dtype, args[0].shape[2]))
        return func(*args, **kwargs or {})

    def dtypes(self, name: str | None = None) -> set[torch.dtype]:
        return {dtype for made, dtype, _ in self.made if name in (None, made)}


def model_of(attention: str, dtype: torch.dtype):
    fields = {"dex_heads": [[1, 5], [], [0, 11, 3]]} if attention == "dex" else {}
    return small_model(attention, **fields).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_logits_are_as_exact_and_tokens_the_likeliest(attention, dtype, monkeypatch):
    model, exact, ids = model_of(attention, dtype), model_of(attention, dtype).double(), tokens(2, 41)
    expected = exact(ids).logits
    monkeypatch.setattr(build, "unavailable", lambda dtype: "fused_cpu: switched off")
    monkeypatch.setattr(half, "is_slow", lambda dtype: False)
    eager = model(ids).logits
    monkeypatch.setattr(half, "is_slow", lambda dtype: True)
    logits = model(ids).logits
    assert not torch.equal(logits, eager), "nothing was computed otherwise"
    compare(logits, expected, eager, factor=1.0)

    text = model.generate(ids, max_new_tokens=11, do_sample=False, pad_token_id=0)
    # A random model's likeliest tokens lie near each other; two logits that are off by eager's error may change places.
    allowed = 2 * (eager.double() - expected).abs().max()
    logits = exact(text).logits[:, ids.shape[1] - 1 : -1]
    chosen = logits.gather(-1, text[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() <= allowed
    assert (logits.amax(-1) - logits.median(-1).values).min() > 4 * allowed, "any token would pass"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_many_rows_and_every_attention_are_float32_and_few_rows_are_not(attention):
    model, cache = model_of(attention, torch.bfloat16), DynamicCache()
    with Products() as many:
        model(tokens(1, half.MANY_ROWS), past_key_values=cache)
    assert {name for name, _, _ in many.made} == {"linear", "attention"}
    assert many.dtypes() == {torch.float32}
    with Products() as one:
        model(tokens(1, 1), past_key_values=cache)
    assert one.made == {("linear", torch.bfloat16, 1), ("attention", torch.float32, 1)}
    with Products() as few:
        model(tokens(half.MANY_ROWS - 1, 1), past_key_values=DynamicCache())
    assert few.dtypes("linear") == {torch.bfloat16}
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}, "the cache stays half as large"
    weights = {p.dtype for name, p in model.named_parameters() if name.endswith("proj.weight")}
    assert weights == {torch.bfloat16}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("attention", ["softmax", "diff_v1"])
def test_with_gradients_every_product_is_in_the_models_dtype(attention):
    model, ids = model_of(attention, torch.bfloat16), tokens(1, 50)
    with Products() as products:
        model(ids, labels=ids).loss.backward()
    assert products.dtypes() == {torch.bfloat16}


@pytest.mark.parametrize("attention", ["softmax", "diff_v1"])
@torch.no_grad()
def test_where_the_processor_multiplies_nothing_is_widened(attention, monkeypatch):
    monkeypatch.setattr(half, "is_slow", lambda dtype: False)
    monkeypatch.setattr(build, "unavailable", lambda dtype: "fused_cpu: switched off")
    with Products() as products:
        model_of(attention, torch.bfloat16)(tokens(1, 50))
    assert products.dtypes() == {torch.bfloat16}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_layers_are_of_the_class_that_quantisers_look_for(attention):
    model = model_of(attention, torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {torch.nn.Linear}
    assert len(layers) > 3 * 7


@pytest.mark.usefixtures("slow")
@torch.no_grad()
def test_hooks_of_layers_see_every_product():
    model, seen = model_of("softmax", torch.bfloat16), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output.dtype)))
    model(tokens(1, 50))
    assert len(seen) == 3 * 7 + 1
    assert {dtype for _, dtype in seen} == {torch.bfloat16}

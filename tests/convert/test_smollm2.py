"""A real pretrained model made softmax, V2 and DEX: its logits, its text, the first step of training."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.smollm2 import smollm2
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from benchmarks.smollm2 import smollm2_gguf
from diffattn.convert.convert import convert
from diffattn.convert.llama import to_dex, to_diff_v2, to_llama, to_softmax
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(900)]

PROMPT = "The Constitution of the United States begins with the words"
TEXT = PROMPT + (
    ' "We the People". It was written in 1787, and it names three branches of government: a legislature of two '
    "chambers, an executive, and courts. No text of its kind has been in force for longer."
)
# Thirty layers whose sums were made in another order, beside logits of up to 36; measured: 6e-5.
ROUNDING = 3e-4
CONVERSIONS: dict[str, Callable] = {"softmax": to_softmax, "diff_v2": to_diff_v2, "dex": to_dex}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2(tmp_path_factory.mktemp("smollm2") / "llama")


@pytest.fixture(scope="module")
def source(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def llama(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ids(folder: Path) -> Callable[[str], Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def expected(llama: LlamaForCausalLM, ids) -> tuple[Tensor, list[int]]:
    """Llama's logits, and the 32 tokens that it goes on with."""
    return logits(llama, ids), continuation(llama, ids)


@torch.no_grad()
def logits(model: PreTrainedModel, ids) -> Tensor:
    return model(ids(TEXT)).logits


def continuation(model: PreTrainedModel, ids) -> list[int]:
    prompt = ids(PROMPT)
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )
    return made[0, prompt.shape[1] :].tolist()


def built(config: dict, tensors: dict[str, Tensor]) -> DiffTransformerForCausalLM:
    model = DiffTransformerForCausalLM._from_config(DiffTransformerConfig.from_dict(json.loads(json.dumps(config))))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval()


@pytest.mark.parametrize("attention", CONVERSIONS)
def test_the_logits_and_the_text_stay(attention: str, source, expected, ids) -> None:
    model = built(*CONVERSIONS[attention](*source))
    assert model.config.attention == attention
    torch.testing.assert_close(logits(model, ids), expected[0], rtol=0, atol=ROUNDING)
    assert continuation(model, ids) == expected[1]


def test_the_gguf_file_itself_is_converted(folder: Path, tmp_path: Path, source) -> None:
    """The tokenizer of the file comes with it, and every weight is what transformers reads."""
    with warnings.catch_warnings():
        # gguf and numpy, in reading the file.
        warnings.simplefilter("ignore")
        done = convert(smollm2_gguf(), tmp_path / "made")
    assert (done.source, done.target, done.parameters) == ("llama", "softmax", 134_515_008)
    made = load_file(tmp_path / "made/model.safetensors")
    assert made.keys() == source[1].keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in source[1].items())
    theirs, ours = (AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "made"))
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids


def test_a_difference_of_the_size_of_a_mistake_is_noticed(source, expected, ids) -> None:
    """W_O as it was: each layer's attention at half its size."""
    config, tensors = to_diff_v2(*source)
    tensors |= {name: tensor / 2 for name, tensor in tensors.items() if name.endswith("o_proj.weight")}
    assert (logits(built(config, tensors), ids) - expected[0]).abs().max() > 100 * ROUNDING


def test_back_to_llama_is_bit_for_bit(source) -> None:
    config, tensors = to_llama(*to_softmax(*source))
    assert config["model_type"] == "llama"
    assert tensors.keys() == source[1].keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in source[1].items())


@pytest.mark.parametrize("attention", ["diff_v2", "dex"])
def test_what_is_new_learns_from_the_first_step(attention: str, source, ids) -> None:
    model = built(*CONVERSIONS[attention](*source))
    text = ids(TEXT)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "self_attn" in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(text, labels=text).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "self_attn" in name}
    optimizer.step()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters() if name in before}
    for values in (gradients, moved):
        for layer in range(30):
            prefix = f"model.layers.{layer}.self_attn."
            if attention == "dex":
                new = [values[f"{prefix}dex.weight"].flatten(1)]
            else:
                noise = values[f"{prefix}q_proj.weight"].view(9, 2, 64, 576)[:, 1]
                new = [noise.flatten(1), values[f"{prefix}lambda_proj.weight"]]
            # Every head of every layer.
            assert all((part.abs().amax(dim=1) > 0).all() for part in new)

"""Adapters of PEFT: each variant beside Llama, from a configuration that names no modules to a merged folder."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from support.ecosystem import LLAMA, MODELS, ids, logits, small, tool
from transformers import AutoModelForCausalLM

from diffattn.variants import ATTENTIONS

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

# Float32 logits of the order of 1: the adapter's product is added to the output, or to the weight.
ROUNDING = 2e-5
# The module of a variant that makes its λ or its gate.
OWN = {name: record.tensors[0].name.partition(".")[0] for name, record in ATTENTIONS.items() if record.tensors}


@pytest.fixture
def peft() -> ModuleType:
    return tool("peft")


def trained(model: torch.nn.Module, *, steps: int = 3) -> torch.nn.Module:
    """A few large steps, so that what has learned is far from where it began."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0)
    for _ in range(steps):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapted(model: torch.nn.Module) -> set[str]:
    """The modules with an adapter, by the names that they have in every layer."""
    names = {name.partition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    layers = {name.split(".layers.")[1].split(".", 1)[1] for name in names}
    assert len(names) == len(layers) * model.config.num_hidden_layers
    return layers


@pytest.mark.parametrize("kind", MODELS)
def test_lora_without_named_modules_adapts_those_of_llama(kind: str, peft: ModuleType) -> None:
    model = peft.get_peft_model(small(kind), peft.LoraConfig())
    assert adapted(model) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", MODELS)
def test_every_other_method_without_named_modules_adapts_those_of_llama(kind: str, peft: ModuleType) -> None:
    for config in (peft.IA3Config(), peft.AdaLoraConfig(total_step=10), peft.LNTuningConfig(), peft.VeraConfig()):
        mine, its = (peft.get_peft_model(small(each), config) for each in (kind, LLAMA))
        assert [mine.peft_config["default"].target_modules, mine.peft_type] == [
            its.peft_config["default"].target_modules, its.peft_type
        ]  # fmt: skip
        assert torch.isfinite(logits(mine)).all()


@pytest.mark.parametrize("targets", [None, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "all-linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_is_saved_reloaded_and_merged(kind: str, targets, peft: ModuleType, tmp_path: Path) -> None:
    model = trained(peft.get_peft_model(small(kind), peft.LoraConfig(r=4, target_modules=targets)))
    wanted = logits(model)
    assert (wanted - logits(small(kind))).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(small(kind), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), wanted)
    merged = again.merge_and_unload()
    assert type(merged) is type(small(kind))
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=ROUNDING)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    assert loaded.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "own"), OWN.items())
def test_what_makes_lambda_or_the_gate_is_trained_beside_an_adapter(
    kind: str, own: str, dtype: torch.dtype, peft: ModuleType, tmp_path: Path
) -> None:
    begun = small(kind).to(dtype)
    model = peft.get_peft_model(small(kind).to(dtype), peft.LoraConfig(modules_to_save=[own]))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad and f".{own}." in name}
    first = {name: p.detach().clone() for name, p in learning.items()}
    trained(model)
    moved = {name for name, p in learning.items() if not torch.equal(p, first[name])}
    # DEX's own λ has a gradient only once its annealing has begun, which is the work of `diffattn train`.
    assert moved == {name for name in learning if not name.endswith("dex.modules_to_save.default.lam")}
    assert moved
    exact = {tensor.name.partition(".")[0]: tensor.float32 for tensor in ATTENTIONS[kind].tensors}
    if exact[own]:
        assert {p.dtype for p in learning.values()} == {torch.float32}
    model.save_pretrained(tmp_path / "adapter")
    if exact[own]:
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {t.dtype for name, t in saved.items() if f".{own}." in name} == {torch.float32}
    again = peft.PeftModel.from_pretrained(small(kind).to(dtype), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    begun_with, now = begun.state_dict(), loaded.state_dict()
    for name in moved:
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert torch.equal(now[plain].float(), learning[name].detach().to(now[plain].dtype).float())
        assert now[plain].dtype == begun_with[plain].dtype
        assert not torch.equal(now[plain], begun_with[plain])
    assert torch.equal(logits(loaded), logits(merged))


def test_an_adapter_of_transformers_needs_no_named_modules(peft: ModuleType) -> None:
    for kind in (LLAMA, "diff_v1"):
        model = small(kind)
        model.add_adapter(peft.LoraConfig())
        assert adapted(model) == {"self_attn.q_proj", "self_attn.v_proj"}


@pytest.mark.parametrize("kind", [LLAMA, "diff_v1"])
def test_an_adapter_without_a_task_names_the_module_of_its_model(kind: str, peft: ModuleType, tmp_path: Path) -> None:
    small(kind).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig()).save_pretrained(tmp_path / "adapter")
    load = peft.AutoPeftModelForCausalLM.from_pretrained
    if kind == LLAMA:
        load(tmp_path / "adapter")
        return
    # PEFT imports no module but those of transformers unless it is told so.
    with pytest.raises(ValueError, match=r"'diffattn\.model\.modeling' which is not in the import allowlist"):
        load(tmp_path / "adapter")
    assert adapted(load(tmp_path / "adapter", import_allowlist=["diffattn.model.modeling"])) == {
        "self_attn.q_proj", "self_attn.v_proj"
    }  # fmt: skip

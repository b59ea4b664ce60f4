import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.ecosystem import with_entry_points
from support.small_models import small_model, tokens

import diffattn
from diffattn.variants import DEFAULT_VARIANTS

LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
assert type(config).__name__ == "DiffTransformerConfig", type(config)
for auto, name in ((AutoModelForCausalLM, "DiffTransformerForCausalLM"), (AutoModel, "DiffTransformerModel")):
    model = auto.from_pretrained(folder)
    assert type(model).__module__ == "diffattn.model.modeling" and type(model).__name__ == name, type(model)
    with torch.device("meta"):
        assert type(auto.from_config(config)).__name__ == name
heads = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
import transformers
for head in heads:
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    assert type(model).__name__ == f"DiffTransformerFor{head}", type(model)
assert transformers.DiffTransformerForCausalLM is type(AutoModelForCausalLM.from_pretrained(folder))
assert AutoConfig.from_pretrained(folder, dtype="auto").dtype == torch.float32
"""

ORDERS = {
    "diffattn alone loads neither torch nor transformers, then the Auto classes": """
        import sys, diffattn
        loaded = {"torch", "transformers"} & set(sys.modules)
        assert not loaded, loaded
    """,
    "diffattn after the Auto classes": "from transformers import AutoModelForCausalLM; import diffattn",
    # Either of these imports the Auto classes while it is itself half-way, and our model needs it whole.
    "a module that our model needs, first": "import diffattn; import transformers.modeling_layers",
    "our attention layer, first": "import diffattn.model.attention",
    "our attention function, first": "import diffattn.model.fused",
    "Llama, first": """
        import diffattn
        import transformers.models.llama.modeling_llama
        import transformers.generation.utils
    """,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_auto_classes_know_the_model_in_every_order_of_imports(order, tmp_path):
    small_model("diff_v1").save_pretrained(tmp_path)
    code = "\n".join(line.strip() for line in order.splitlines()) + LOAD
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_a_saved_model_loads_by_its_own_name(attention, tmp_path):
    from transformers import AutoModelForCausalLM

    model = small_model(attention)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is diffattn.DiffTransformerForCausalLM
    assert bool((loaded(tokens(1, 3)).logits == model(tokens(1, 3)).logits).all())


# What a program imports that has never heard of diffattn. PyTorch calls `register`, also where these are half-way.
@pytest.mark.parametrize(
    "program",
    [
        "from transformers import AutoModelForCausalLM",
        pytest.param("import torch", marks=pytest.mark.full),
        pytest.param("from transformers import AutoConfig; AutoConfig.from_pretrained(folder)", marks=pytest.mark.full),
        pytest.param("import transformers.modeling_layers", marks=pytest.mark.full),
    ],
)
def test_programs_that_import_no_diffattn_know_the_model_once_it_is_installed(program: str, tmp_path: Path) -> None:
    small_model("diff_v1").save_pretrained(tmp_path / "model")
    environment = with_entry_points(tmp_path / "installed")
    code = f"import sys; folder = sys.argv[1]; {program}" + LOAD
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_tables_of_peft_have_our_models_beside_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "peft" / "utils"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "constants.py").write_text(
        """TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING = {"bloom": None}
OTHERS = {"llama": 1}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    tables = importlib.import_module("peft.utils.constants")
    for name in ("peft", "peft.utils", "peft.utils.constants"):
        monkeypatch.delitem(sys.modules, name)
    assert tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["diff_transformer"] == ["q_proj", "v_proj"]
    assert "diff_transformer" not in tables.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    assert tables.OTHERS == {"llama": 1}


def test_registering_twice_changes_nothing():
    finders = len(sys.meta_path)
    diffattn.register()
    assert len(sys.meta_path) == finders


def test_names_that_the_package_does_not_have_are_refused():
    with pytest.raises(AttributeError, match="module 'diffattn' has no attribute 'diff_attn'"):
        _ = diffattn.diff_attn
    with pytest.raises(ImportError):
        from diffattn import DiffConfig  # noqa: F401

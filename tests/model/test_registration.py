import subprocess
import sys

import pytest
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


def test_registering_twice_changes_nothing():
    finders = len(sys.meta_path)
    diffattn.register()
    assert len(sys.meta_path) == finders


def test_names_that_the_package_does_not_have_are_refused():
    with pytest.raises(AttributeError, match="module 'diffattn' has no attribute 'diff_attn'"):
        _ = diffattn.diff_attn
    with pytest.raises(ImportError):
        from diffattn import DiffConfig  # noqa: F401

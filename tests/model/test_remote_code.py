import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_models import assert_same_logits, small_model, tokens
from transformers import AutoModelForCausalLM

import diffattn
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.heads.language import DiffTransformerForMaskedLM
from diffattn.model.remote_code import AUTO_MAP, flattened, write_remote_code

MODELS = {
    "softmax": ("softmax", {}),
    "diff_v1": ("diff_v1", {}),
    "diff_v2": ("diff_v2", {"qk_norm": True, "attention_bias": True}),
    "grouped": ("diff_gda", {"hidden_act": "poly_norm", "lambda_init": [-0.1, 0.2, 0.4]}),
    "windows": (
        "diff_v1",
        {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "dex": ("dex", {"dex_heads": [[1, 5], [], [0, 11, 3]], "mlp_bias": True}),
}
WITHOUT_DIFFATTN = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffattn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification

found = {}
ids = torch.tensor(eval(sys.argv[2]))
for name in sys.argv[3:]:
    folder = f"{sys.argv[1]}/{name}"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        found[f"{name} logits"] = model(ids).logits
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        found[f"{name} packed"] = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    found[f"{name} text"] = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)
    # It takes its code along.
    model.save_pretrained(f"{folder} again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder} again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        hidden = decoder(ids).last_hidden_state
        assert torch.equal(model.lm_head(hidden), found[f"{name} logits"])
for auto in (AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification):
    head = auto.from_pretrained(folder, trust_remote_code=True, pad_token_id=0)
    assert all(map(torch.equal, decoder.parameters(), head.model.parameters())), auto
encoder = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, is_causal=False).eval()
with torch.no_grad():
    found["encoder logits"] = encoder(ids).logits
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=True, rms_norm_eps=float("nan"))
except ValueError as error:
    assert "rms_norm_eps=nan" in str(error)
else:
    raise AssertionError("a field that cannot be was taken")
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("code was run that nobody trusted")
assert not [name for name in sys.modules if name.partition(".")[0] == "diffattn"]
save_file(found, f"{sys.argv[1]}/found.safetensors")
"""


def model_of(name: str):
    attention, fields = MODELS[name]
    model = small_model(attention, **fields)
    if attention == "dex":
        for layer in model.model.layers:
            if layer.self_attn.heads:
                torch.nn.init.normal_(layer.self_attn.dex.weight, std=0.3)
                torch.nn.init.normal_(layer.self_attn.dex.lam)
                layer.self_attn.dex.annealed.fill_(0.7)
    return model


def python_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


@torch.no_grad()
def test_models_load_without_diffattn_and_say_the_same(tmp_path):
    ids = tokens(2, 9)
    models = {name: model_of(name) for name in MODELS}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, remote_code=True)
    # PyTorch would ask for what the metadata of an installed diffattn says, which the program below takes for absent.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFATTN, str(tmp_path), str(ids.tolist()), *models],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    for name, model in models.items():
        assert_same_logits(found[f"{name} logits"], model(ids).logits)
        alone = torch.cat([model(part).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
        assert_same_logits(found[f"{name} packed"], alone)
        expected = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert torch.equal(found[f"{name} text"], expected)
    encoder = DiffTransformerForMaskedLM(DiffTransformerConfig(**model.config.to_dict() | {"is_causal": False})).eval()
    encoder.load_state_dict(model.state_dict())
    assert_same_logits(found["encoder logits"], encoder(ids).logits)
    assert len({tuple(found[f"{name} text"].flatten().tolist()) for name in models}) == len(models)


def test_where_diffattn_is_imported_its_own_class_loads_the_folder(tmp_path):
    model = small_model("diff_v1")
    model.save_pretrained(tmp_path / "shipped", remote_code=True)
    assert json.loads((tmp_path / "shipped" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {f"{place.partition('.')[0]}.py" for place in AUTO_MAP.values()} < python_files(tmp_path / "shipped")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped")
    assert type(loaded) is diffattn.DiffTransformerForCausalLM
    assert torch.equal(loaded(tokens(1, 3)).logits, model(tokens(1, 3)).logits)
    # A plain save of either writes neither code nor the names of code that is not there.
    for name, saved in (("loaded", loaded), ("model", model), ("new", small_model("softmax"))):
        saved.save_pretrained(tmp_path / name)
        assert python_files(tmp_path / name) == set()
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_no_shipped_file_imports_diffattn_or_names_what_is_not_there(tmp_path):
    files = write_remote_code(tmp_path)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("diffattn")]
            if isinstance(node, ast.ImportFrom) and node.level:
                assert tmp_path / f"{node.module}.py" in files
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("diffattn")
    undefined = subprocess.run(
        [Path(sys.executable).parent / "ruff", "check", "--isolated", "--select", "F821", "--quiet", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert undefined.returncode == 0, undefined.stdout


SOURCE = """
import os
import diffattn.model.fused
from diffattn.errors import ConfigError, DataError as Wrong
from diffattn.ops.cpu import build
from diffattn.plan.shape import (
    ModelShape,
    VARIANTS,
)

@staticmethod
def presets():
    return files("diffattn.plan")

def named():
    "Speaks of diffattn.plan and stays."
    from diffattn.ops.standard import subtract
    return subtract

class Model:
    def load(self):
        return presets()
    def save(self):
        def inner():
            from diffattn.model.remote_code import write
            return write
        return inner
    def run(self):
        return named()
"""
FLATTENED = """
import os
from .diff_errors import ConfigError, DataError as Wrong
from .diff_shape import ModelShape, VARIANTS


def named():
    "Speaks of diffattn.plan and stays."
    from .diff_standard import subtract
    return subtract

class Model:
    def run(self):
        return named()
"""


def test_what_needs_a_module_that_is_not_shipped_stays_behind():
    assert flattened(SOURCE) == FLATTENED


@pytest.mark.parametrize("source", ["x = 1\n", "from os import path\nimport re\n"])
def test_other_imports_stay_as_they_are(source):
    assert flattened(source) == source

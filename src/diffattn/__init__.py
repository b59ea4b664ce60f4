"""Differential Transformers, each next to the softmax Transformer that it replaces.

Names load on first use; ``AutoModelForCausalLM`` knows the models once this package is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffattn.model.registration import register

if TYPE_CHECKING:
    from diffattn.data.packing import prepare_data as prepare_data
    from diffattn.model.configuration import DiffTransformerConfig as DiffTransformerConfig
    from diffattn.model.modeling import DiffTransformerForCausalLM as DiffTransformerForCausalLM
    from diffattn.model.modeling import DiffTransformerModel as DiffTransformerModel
    from diffattn.model.pairing import build_pair as build_pair
    from diffattn.ops.dispatch import diff_attention as diff_attention
    from diffattn.plan.shape import ModelShape as ModelShape
    from diffattn.probes.lens import lens as lens
    from diffattn.probes.run import evaluate as evaluate
    from diffattn.study.compare import compare as compare
    from diffattn.train.recipe import Recipe as Recipe
    from diffattn.train.run import train as train

__version__ = "0.1.0"

_HOME = {
    "DiffTransformerConfig": "model.configuration",
    "DiffTransformerForCausalLM": "model.modeling",
    "DiffTransformerModel": "model.modeling",
    "ModelShape": "plan.shape",
    "Recipe": "train.recipe",
    "build_pair": "model.pairing",
    "compare": "study.compare",
    "diff_attention": "ops.dispatch",
    "evaluate": "probes.run",
    "lens": "probes.lens",
    "prepare_data": "data.packing",
    "train": "train.run",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffattn' has no attribute {name!r}")
    return getattr(import_module(f"diffattn.{_HOME[name]}"), name)


register()

"""Differential Transformers, each next to the softmax Transformer that it replaces.

Names load on first use; the Auto classes know the models once this package is imported. No public name is that
of a room: importing ``diffattn.train`` makes ``diffattn.train`` the package, so the function is ``train_model``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffattn.model.registration import register

if TYPE_CHECKING:
    from diffattn.convert.convert import convert as _convert
    from diffattn.data.packing import prepare_data as prepare_data
    from diffattn.demo.build import build_demo as build_demo
    from diffattn.export.fixed import FixedDecoder as FixedDecoder
    from diffattn.export.onnx import export_onnx as export_onnx
    from diffattn.export.run import OnnxDecoder as OnnxDecoder
    from diffattn.generate.decoding import Decoding as Decoding
    from diffattn.generate.generation import generate as _generate
    from diffattn.model.configuration import DiffTransformerConfig as DiffTransformerConfig
    from diffattn.model.heads.classifiers import (
        DiffTransformerForQuestionAnswering as DiffTransformerForQuestionAnswering,
    )
    from diffattn.model.heads.classifiers import (
        DiffTransformerForSequenceClassification as DiffTransformerForSequenceClassification,
    )
    from diffattn.model.heads.classifiers import (
        DiffTransformerForTokenClassification as DiffTransformerForTokenClassification,
    )
    from diffattn.model.heads.language import DiffTransformerForMaskedLM as DiffTransformerForMaskedLM
    from diffattn.model.loading import load as load
    from diffattn.model.modeling import DiffTransformerForCausalLM as DiffTransformerForCausalLM
    from diffattn.model.modeling import DiffTransformerModel as DiffTransformerModel
    from diffattn.model.pairing import build_pair as build_pair
    from diffattn.model.sharding import check_sharded as check_sharded
    from diffattn.model.sharding import data_ranks as data_ranks
    from diffattn.model.sharding import mesh_for as mesh_for
    from diffattn.model.sharding import shard as shard
    from diffattn.ops.dispatch import diff_attention as diff_attention
    from diffattn.plan.answer import plan as _plan
    from diffattn.plan.cluster.answer import plan_cluster as plan_cluster
    from diffattn.plan.named_model import load_shape as load_shape
    from diffattn.plan.setting import Setting as Setting
    from diffattn.plan.shape import ModelShape as ModelShape
    from diffattn.probes.lens import lens as lens
    from diffattn.probes.options import EvaluateOptions as EvaluateOptions
    from diffattn.probes.run import evaluate as evaluate
    from diffattn.scaling.ablation import ablation as ablation
    from diffattn.scaling.fit import fit_scaling as fit_scaling
    from diffattn.scaling.ladder import run_ladder as run_ladder
    from diffattn.scaling.options import LadderOptions as LadderOptions
    from diffattn.scaling.points import read_points as read_points
    from diffattn.serve.engines import serve as _serve
    from diffattn.study.compare import compare as compare
    from diffattn.study.measured_machine import measure_machine as measure_machine
    from diffattn.study.options import CompareOptions as CompareOptions
    from diffattn.study.plan_check import measure_plan as measure_plan
    from diffattn.train.continued import continue_training as continue_training
    from diffattn.train.recipe import Recipe as Recipe
    from diffattn.train.run import train as _train

    convert_checkpoint, generate_text, plan_pair, serve_model, train_model = _convert, _generate, _plan, _serve, _train

__version__ = "0.1.0"

_HOME = {
    "CompareOptions": "study.options:CompareOptions",
    "Decoding": "generate.decoding:Decoding",
    "DiffTransformerConfig": "model.configuration:DiffTransformerConfig",
    "DiffTransformerForCausalLM": "model.modeling:DiffTransformerForCausalLM",
    "DiffTransformerForMaskedLM": "model.heads.language:DiffTransformerForMaskedLM",
    "DiffTransformerForQuestionAnswering": "model.heads.classifiers:DiffTransformerForQuestionAnswering",
    "DiffTransformerForSequenceClassification": "model.heads.classifiers:DiffTransformerForSequenceClassification",
    "DiffTransformerForTokenClassification": "model.heads.classifiers:DiffTransformerForTokenClassification",
    "DiffTransformerModel": "model.modeling:DiffTransformerModel",
    "EvaluateOptions": "probes.options:EvaluateOptions",
    "FixedDecoder": "export.fixed:FixedDecoder",
    "LadderOptions": "scaling.options:LadderOptions",
    "ModelShape": "plan.shape:ModelShape",
    "OnnxDecoder": "export.run:OnnxDecoder",
    "Recipe": "train.recipe:Recipe",
    "Setting": "plan.setting:Setting",
    "ablation": "scaling.ablation:ablation",
    "build_demo": "demo.build:build_demo",
    "build_pair": "model.pairing:build_pair",
    "check_sharded": "model.sharding:check_sharded",
    "compare": "study.compare:compare",
    "continue_training": "train.continued:continue_training",
    "convert_checkpoint": "convert.convert:convert",
    "data_ranks": "model.sharding:data_ranks",
    "diff_attention": "ops.dispatch:diff_attention",
    "evaluate": "probes.run:evaluate",
    "export_onnx": "export.onnx:export_onnx",
    "fit_scaling": "scaling.fit:fit_scaling",
    "generate_text": "generate.generation:generate",
    "lens": "probes.lens:lens",
    "load": "model.loading:load",
    "load_shape": "plan.named_model:load_shape",
    "measure_machine": "study.measured_machine:measure_machine",
    "measure_plan": "study.plan_check:measure_plan",
    "mesh_for": "model.sharding:mesh_for",
    "plan_cluster": "plan.cluster.answer:plan_cluster",
    "plan_pair": "plan.answer:plan",
    "prepare_data": "data.packing:prepare_data",
    "read_points": "scaling.points:read_points",
    "run_ladder": "scaling.ladder:run_ladder",
    "serve_model": "serve.engines:serve",
    "shard": "model.sharding:shard",
    "train_model": "train.run:train",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffattn' has no attribute {name!r}")
    module, attribute = _HOME[name].split(":")
    return getattr(import_module(f"diffattn.{module}"), attribute)


register()

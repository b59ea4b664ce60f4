"""The model's Python files for those who have ``transformers`` and not diffattn: ``trust_remote_code=True``.

They are made from our own sources, so there is one model. A shipped module lies flat beside the weights and imports the
others from there. What needs a module that is not shipped stays behind: the fused kernel, the planner's presets, and
saving these files again, which ``transformers`` does by itself for code that came from a folder.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

from diffattn.files import write_text

_PACKAGE = "diffattn"
# Our modules, and their names beside the weights.
_SHIPPED = {
    "diffattn.model.modeling": "modeling_diff_transformer",
    "diffattn.model.heads.language": "masked_diff_transformer",
    "diffattn.model.heads.classifiers": "classifiers_diff_transformer",
    "diffattn.model.configuration": "configuration_diff_transformer",
    "diffattn.model.attention": "diff_attention",
    "diffattn.model.activations": "diff_activations",
    "diffattn.model.masks.layers": "diff_masks",
    "diffattn.model.masks.pattern": "diff_mask_pattern",
    "diffattn.model.masks.sequences": "diff_mask_sequences",
    "diffattn.model.masks.whole": "diff_mask_whole",
    "diffattn.model.transformers_private": "diff_transformers_private",
    "diffattn.ops.half": "diff_half",
    "diffattn.ops.standard": "diff_standard",
    "diffattn.ops.derivatives": "diff_derivatives",
    "diffattn.ops.sdpa": "diff_sdpa",
    "diffattn.ops.visibility": "diff_visibility",
    "diffattn.ops.reference": "diff_reference",
    "diffattn.ops.torch_private": "diff_torch_private",
    "diffattn.plan.shape": "diff_shape",
    "diffattn.config_fields": "diff_config_fields",
    "diffattn.layer_kinds": "diff_layer_kinds",
    "diffattn.head_lists": "diff_head_lists",
    "diffattn.variants": "diff_variants",
    "diffattn.attention_flops": "diff_attention_flops",
    "diffattn.quantities": "diff_quantities",
    "diffattn.errors": "diff_errors",
    "diffattn.private_names": "diff_private_names",
}
AUTO_MAP = {
    "AutoConfig": "configuration_diff_transformer.DiffTransformerConfig",
    "AutoModel": "modeling_diff_transformer.DiffTransformerModel",
    "AutoModelForCausalLM": "modeling_diff_transformer.DiffTransformerForCausalLM",
    "AutoModelForMaskedLM": "masked_diff_transformer.DiffTransformerForMaskedLM",
    "AutoModelForSequenceClassification": "classifiers_diff_transformer.DiffTransformerForSequenceClassification",
    "AutoModelForTokenClassification": "classifiers_diff_transformer.DiffTransformerForTokenClassification",
    "AutoModelForQuestionAnswering": "classifiers_diff_transformer.DiffTransformerForQuestionAnswering",
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def write_remote_code(folder: str | os.PathLike) -> list[Path]:
    """Write the files into a folder, which is made where there is none; returns their paths.

    ``config.json`` has to name them: ``auto_map`` is :data:`AUTO_MAP`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parents[1]
    written = []
    for module, name in _SHIPPED.items():
        source = root.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
        written.append(folder / f"{name}.py")
        write_text(written[-1], f"# Made by diffattn from its {module}.\n{flattened(source)}")
    return written


def flattened(source: str) -> str:
    """Returns a module's source with relative imports of our modules, without what needs one that is not shipped.

    >>> print(flattened('from diffattn.errors import ConfigError\\nfrom diffattn.ops import build\\nx = 1\\n'))
    from .diff_errors import ConfigError
    x = 1
    <BLANKLINE>
    """
    tree = ast.parse(source)
    changes: dict[tuple[int, int], list[str]] = {}
    for function in _left_behind(tree):
        if not _within(function, changes):
            start = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            changes[start, _end(function)] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not _within(node, changes):
            ours, lines = _import(node)
            if ours:
                changes[node.lineno, _end(node)] = [" " * node.col_offset + line for line in lines]
    lines = source.splitlines()
    for (start, end), new in sorted(changes.items(), reverse=True):
        lines[start - 1 : end] = new
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)) + "\n"


def _import(node: ast.Import | ast.ImportFrom) -> tuple[bool, list[str]]:
    """Returns whether an import is of ours, and the lines for it: none for modules that are not shipped."""
    if isinstance(node, ast.Import):
        return any(_is_ours(alias.name) for alias in node.names), []
    if node.level or not _is_ours(node.module):
        return False, []
    if node.module not in _SHIPPED:
        return True, []
    names = ", ".join(alias.name if alias.asname is None else f"{alias.name} as {alias.asname}" for alias in node.names)
    return True, [f"from .{_SHIPPED[node.module]} import {names}"]


def _left_behind(tree: ast.Module) -> list[_Function]:
    """Functions and methods that name a module of ours that is not shipped, or a function that is left behind."""
    # An outer one comes before those within it.
    functions = [node for node in ast.walk(tree) if isinstance(node, _Function)]
    left: list[_Function] = []
    while True:
        gone = {function.name for function in left if function in tree.body}
        more = [f for f in functions if f not in left and any(_needs(node, gone) for node in ast.walk(f))]
        if not more:
            return left
        left += more


def _needs(node: ast.AST, gone: set[str]) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        ours, lines = _import(node)
        return ours and not lines
    if isinstance(node, ast.Name):
        return node.id in gone
    # Such a string names a package, as importlib.resources.files("diffattn.plan") does.
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_ours(node.value)


def _within(node: ast.stmt, ranges: dict[tuple[int, int], list[str]]) -> bool:
    return any(start <= node.lineno <= end for start, end in ranges)


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _is_ours(name: str | None) -> bool:
    return name is not None and (name == _PACKAGE or name.startswith(f"{_PACKAGE}.")) and " " not in name

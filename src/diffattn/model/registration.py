"""Makes ``AutoConfig`` and ``AutoModelForCausalLM`` know ``diff_transformer`` once ``diffattn`` is imported.

Registering needs the classes, and importing them costs more than a second. So where the library's Auto modules are
not loaded yet, they are registered at the moment when these are first imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_CONFIG = "transformers.models.auto.configuration_auto"
_MODEL = "transformers.models.auto.modeling_auto"
# Our model imports these. If one of them is only half imported, because it is what imports the Auto classes, then
# registration waits until it has finished.
_NEEDED = (
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
)
_OURS = (
    "diffattn.model.configuration",
    "diffattn.model.transformers_private",
    "diffattn.model.fused",
    "diffattn.model.attention",
    "diffattn.model.modeling",
)


def register() -> None:
    """Register now what can be registered, and the rest as soon as its module has been imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _register_what_is_loaded()


def _loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register_what_is_loaded() -> None:
    if _loaded(_CONFIG) and (_OURS[0] not in sys.modules or _loaded(_OURS[0])):
        from diffattn.model.configuration import DiffTransformerConfig

        auto = sys.modules[_CONFIG]
        auto.AutoConfig.register(DiffTransformerConfig.model_type, DiffTransformerConfig, exist_ok=True)
        half_way = [name for name in (*_NEEDED, *_OURS) if name in sys.modules and not _loaded(name)]
        if _loaded(_MODEL) and not half_way:
            from diffattn.model.modeling import DiffTransformerForCausalLM, DiffTransformerModel

            models = sys.modules[_MODEL]
            models.AutoModel.register(DiffTransformerConfig, DiffTransformerModel, exist_ok=True)
            models.AutoModelForCausalLM.register(DiffTransformerConfig, DiffTransformerForCausalLM, exist_ok=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finder find one of these modules, and registers after it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in (_CONFIG, _MODEL, *_OURS, *_NEEDED):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # The module has run to its end; the import system clears this mark only after this call.
        module.__spec__._initializing = False  # type: ignore[attr-defined]
        _register_what_is_loaded()

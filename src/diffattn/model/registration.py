"""Makes ``AutoConfig``, the Auto classes of models and PEFT know ``diff_transformer``, as soon as these are imported.

Registering needs the classes, and importing them costs more than a second. So where the library's Auto modules are
not loaded yet, they are registered at the moment when these are first imported. So are the tables of PEFT.

Programs of others import no diffattn. PyTorch calls ``register`` for them when it is imported, by the entry point in
its group ``torch.backends``, unless ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` is set.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_LIBRARY = "transformers"
_CONFIG = "transformers.models.auto.configuration_auto"
_MODEL = "transformers.models.auto.modeling_auto"
# Its tables say which modules an adapter changes where a user names none.
_PEFT = "peft.utils.constants"
# Our model imports these. If one of them is only half imported, because it is what imports the Auto classes, then
# registration waits until it has finished.
_NEEDED = (
    "torch",
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
    "diffattn.model.heads.language",
    "diffattn.model.heads.classifiers",
)
_WATCHED = (_LIBRARY, _CONFIG, _MODEL, _PEFT, *_OURS, *_NEEDED)
# The library makes its module twice while it is imported, and programs may hold either.
_libraries: list[ModuleType] = []


def register() -> None:
    """Register now what can be registered, and the rest as soon as its module has been imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        for name in _WATCHED:
            spec = getattr(sys.modules.get(name), "__spec__", None)
            if spec is not None and not _loaded(name):
                spec.__class__ = _Spec
    _register_what_is_loaded()


def _loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register_what_is_loaded() -> None:
    if _loaded(_LIBRARY) and sys.modules[_LIBRARY] not in _libraries:
        _libraries.append(sys.modules[_LIBRARY])
    if "torch" in sys.modules and not _loaded("torch"):
        return
    if _loaded(_CONFIG) and (_OURS[0] not in sys.modules or _loaded(_OURS[0])):
        from diffattn.model.configuration import DiffTransformerConfig

        auto = sys.modules[_CONFIG]
        auto.AutoConfig.register(DiffTransformerConfig.model_type, DiffTransformerConfig, exist_ok=True)
        half_way = [name for name in (*_NEEDED, *_OURS) if name in sys.modules and not _loaded(name)]
        if _loaded(_MODEL) and not half_way:
            from diffattn.model import modeling
            from diffattn.model.heads import classifiers, language

            for name, ours in {
                "AutoModel": modeling.DiffTransformerModel,
                "AutoModelForCausalLM": modeling.DiffTransformerForCausalLM,
                "AutoModelForMaskedLM": language.DiffTransformerForMaskedLM,
                "AutoModelForSequenceClassification": classifiers.DiffTransformerForSequenceClassification,
                "AutoModelForTokenClassification": classifiers.DiffTransformerForTokenClassification,
                "AutoModelForQuestionAnswering": classifiers.DiffTransformerForQuestionAnswering,
            }.items():
                getattr(sys.modules[_MODEL], name).register(DiffTransformerConfig, ours, exist_ok=True)
                # There `transformers serve` looks up the name under `architectures` in config.json.
                for library in _libraries:
                    setattr(library, ours.__name__, ours)
    if _loaded(_PEFT):
        from diffattn.config_fields import OURS

        # Our projections, norms and feed-forward network have Llama's names.
        for name, table in vars(sys.modules[_PEFT]).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
                table.setdefault(OURS, table["llama"])


class _Spec(importlib.machinery.ModuleSpec):
    """The spec of one of these modules, which registers when Python notes in it that the module has run to its end."""

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing"))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            _register_what_is_loaded()


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finder find one of these modules, and has it watched."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None:
            spec.__class__ = _Spec
        return spec

"""Public models by name: what their configuration says, where it stands, and the parameters that are published."""

from __future__ import annotations

import functools
import importlib.resources
import tomllib
from dataclasses import dataclass, field

from diffattn.config_fields import Config
from diffattn.names import one_of, plain
from diffattn.plan.checkpoints.shape import PlannedCheckpoint, shape_of

# What stands for a field that is null, of which TOML has none.
_NULL = "null"


@dataclass(frozen=True, kw_only=True)
class PublicModel:
    """The record of one public model."""

    name: str
    """The name, as ``--model`` takes it."""
    source: str
    """The repository of its makers on the Hugging Face hub, whose ``config.json`` has these fields."""
    published: int | None = None
    """The parameters that its makers publish; None: no number of theirs is known."""
    published_in: str = ""
    """The place of that number: the headers of the weights, the model card or the paper."""
    part: str = ""
    """The part of the model that is planned, where it is not all of it."""
    config: Config = field(default_factory=dict)
    """The fields of its ``config.json`` that a plan counts."""

    def planned(self) -> PlannedCheckpoint:
        """Returns its shape and its variant, read as a folder's ``config.json`` is."""
        found = shape_of(self.config, self.name, self.name)
        return found._replace(said=(*found.said, f"Of {self.name} {self.part} is planned.")) if self.part else found


@functools.cache
def public_models() -> dict[str, PublicModel]:
    """Returns the records by name.

    >>> public_models()["smollm2-135M"].published
    134515008
    """
    found: dict[str, PublicModel] = {}
    folder = importlib.resources.files("diffattn.plan").joinpath("models")
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if file.name.endswith(".toml"):
            for name, values in tomllib.loads(file.read_text(encoding="utf-8")).items():
                config = {key: None if value == _NULL else value for key, value in values.pop("config").items()}
                found[name] = PublicModel(name=name, config=config, **values)
    return found


def is_public(text: str) -> bool:
    """Tells whether a text is the name of a public model, in any case and with any marks.

    >>> is_public("Llama 3.2 1b"), is_public("llama-9")
    (True, False)
    """
    return plain(text) in {plain(name) for name in public_models()}


def find_public(text: str, *, given: str) -> PublicModel:
    """Returns the public model that a text names, or of which it is a part that one name alone has.

    Raises:
        ConfigError: no such model, or several.

    >>> find_public("motif 3", given="model 'motif 3'").name
    'motif-3'
    """
    models = public_models()
    return models[one_of(text, models, given=given)]

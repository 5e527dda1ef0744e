"""All shipped recipes, by the command they are for, each as the complete file that a user may edit."""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from recipes.distill import settings as distill
from recipes.prune import settings as prune
from recipes.quantize import settings as quantize
from recipes.settings import Effort, Settings, load_recipe, recipe_names, recipe_text
from recipes.synth import settings as synth

WIDTH = 100


@dataclass(frozen=True)
class Kind:
    """The recipes of one command: what they set, and the package that they stand in."""

    settings: type[Settings]
    package: str

    @property
    def names(self) -> list[str]:
        return recipe_names(self.package)


KINDS: Mapping[str, Kind] = {
    "synth": Kind(synth.SynthSettings, synth.PACKAGE),
    "quantize": Kind(quantize.QuantizeSettings, quantize.PACKAGE),
    "prune": Kind(prune.PruneSettings, prune.PACKAGE),
    "distill": Kind(distill.DistillSettings, distill.PACKAGE),
}
"""By command, in the order in which they are used."""


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its value without any effort, None where it is not set, and what it is."""

    name: str
    value: Any
    about: str


@dataclass(frozen=True)
class Recipe:
    """A recipe with all its keys, those that its file leaves at their defaults too."""

    about: str
    keys: list[Key]
    efforts: dict[str, dict[str, Any]]
    """Keys that an effort changes."""

    def text(self) -> str:
        """A TOML file that loads as this recipe does, at every effort; every key stands under what it is."""
        lines = [*_comment(self.about)]
        for key in self.keys:
            lines += ["", *_comment(key.about), _assignment(key.name, key.value)]
        for name, table in self.efforts.items():
            lines += ["", f"[effort.{name}]", *(_assignment(key, value) for key, value in table.items())]
        return "\n".join(lines)


def read_recipe(kind: Kind, recipe: str) -> Recipe:
    """The shipped recipe of that name, or the file `recipe`, complete.

    Raises SettingsError where `load_recipe` does, at any effort.
    """
    for effort in get_args(Effort):
        load_recipe(kind.settings, kind.package, recipe, effort)
    text, _ = recipe_text(kind.package, recipe)
    values = tomllib.loads(text)
    efforts = values.pop("effort", {})
    fields = kind.settings.model_fields
    defaults = {name: None if field.is_required() else field.default for name, field in fields.items()}
    keys = [Key(name, value, fields[name].description or "") for name, value in (defaults | values).items()]
    return Recipe(head(text), keys, efforts)


def head(text: str) -> str:
    """What a file says of itself: the comment that it begins with, on one line."""
    return " ".join(line.lstrip("# ") for line in _first_comment(text))


def _first_comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text.replace("\n", " "), WIDTH, break_on_hyphens=False)]


def _assignment(key: str, value: Any) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    """Text, a truth value, a number, or lists and tables of them; the first two as JSON writes them."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)

"""All shipped recipes, by the command they are for, each as the complete file that a user may edit."""

from __future__ import annotations

import itertools
import json
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from recipes.distill import settings as distill
from recipes.prune import settings as prune
from recipes.quantize import settings as quantize
from recipes.settings import Effort, Settings, SettingsError, load_recipe, recipe_names, recipe_text
from recipes.synth import settings as synth

WIDTH = 100
ORDER = "What counts, each over the one before: these keys, those of the effort that is asked for, --set."


@dataclass(frozen=True)
class Kind:
    """The recipes of one command: what they set, the package that they stand in, and which one is the default."""

    settings: type[Settings]
    package: str
    default: str

    @property
    def names(self) -> list[str]:
        return recipe_names(self.package)


KINDS: Mapping[str, Kind] = {
    "synth": Kind(synth.SynthSettings, synth.PACKAGE, "default"),
    "quantize": Kind(quantize.QuantizeSettings, quantize.PACKAGE, "qdrop"),
    "prune": Kind(prune.PruneSettings, prune.PACKAGE, "obs"),
    "distill": Kind(distill.DistillSettings, distill.PACKAGE, "default"),
}
"""By command, in the order in which they are used."""


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its value without any effort, None where it is not set, and what it is.

    `words` are those that it may be, where it is one of a few.
    """

    name: str
    value: Any
    about: str
    words: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        words = [f"# One of {', '.join(map(json.dumps, self.words))}."] if self.words else []
        return [*_comment(self.about), *words, _assignment(self.name, self.value)]


@dataclass(frozen=True)
class Recipe:
    """A recipe with all its keys, those that its file leaves at their defaults too."""

    about: str
    keys: list[Key]
    efforts: dict[str, dict[str, Any]]
    """Keys that an effort changes."""
    asides: dict[str, str]
    """What the file says right above the keys of an effort."""

    def text(self) -> str:
        """A TOML file that loads as this recipe does, at every effort; every key stands under what it is."""
        lines = [*_comment(self.about), "", *_comment(ORDER)]
        for key in self.keys:
            lines += ["", *key.lines()]
        for name, table in self.efforts.items():
            lines += [
                "",
                *_comment(self.asides.get(name, "")),
                f"[effort.{name}]",
                *_comment(
                    f"With --effort {name} alone, in the place of the above: other keys belong above this table."
                ),
                *(_assignment(key, value) for key, value in table.items()),
            ]
        return "\n".join(lines)


def read_recipe(kind: Kind, recipe: str) -> Recipe:
    """The shipped recipe of that name, or the file `recipe`, complete.

    Raises SettingsError where `load_recipe` does, at any effort.
    """
    load_recipe(kind.settings, kind.package, recipe)
    for effort in (effort for effort in get_args(Effort) if effort != "default"):
        try:
            load_recipe(kind.settings, kind.package, recipe, effort)
        except SettingsError as error:
            raise SettingsError(f"at --effort {effort}, {error}") from None
    text, _ = recipe_text(kind.package, recipe)
    values = tomllib.loads(text)
    efforts = values.pop("effort", {})
    fields = kind.settings.model_fields
    defaults = {name: None if field.is_required() else field.default for name, field in fields.items()}
    keys = [
        Key(name, value, fields[name].description or "", _words(fields[name].annotation))
        for name, value in (defaults | values).items()
    ]
    return Recipe(
        _remark(text.splitlines()), keys, efforts, {name: _above(f"[effort.{name}]", text) for name in efforts}
    )


def _words(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _above(header: str, text: str) -> str:
    """The comment right above a table."""
    lines = text.splitlines()
    return _remark(lines[lines.index(header) - 1 :: -1], -1) if header in lines[1:] else ""


def _remark(lines: Iterable[str], order: Literal[1, -1] = 1) -> str:
    """The comment that `lines` begin with, without its marks; its lines come last to first where `order` is -1."""
    marked = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    return " ".join(marked[::order])


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
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML wants escaped, and JSON not

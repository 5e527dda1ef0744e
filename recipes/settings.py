"""Named, strict settings: every recipe is a TOML file beside its engine, and a misspelt key is an error.

A recipe file holds the keys of one settings class at its top level and may hold tables `[effort.fast]`,
`[effort.default]` and `[effort.paper]` that override some of them. Order: file, effort, `--set`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticKnownError

from converters.errors import MixMixError, nearest

if TYPE_CHECKING:  # settings are read before torch is there, which takes seconds to import
    from torch import Tensor

Effort = Literal["fast", "default", "paper"]
Precision = Literal["auto", "float32", "bfloat16"]
Share = Annotated[float, Field(ge=0, lt=1)]
Jitter = tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]]
"""Largest change of brightness, contrast, saturation (as shares) and hue (of the circle)."""

INT64_MAX = 2**63 - 1


class SettingsError(MixMixError):
    """A recipe that does not exist, an unknown key, or a value that does not fit."""


class Settings(BaseModel):
    """Base of all settings: frozen, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        """Whole numbers count images, steps or elements, in torch's 64 bits."""
        if isinstance(value, int) and value > INT64_MAX:
            raise PydanticKnownError("less_than_equal", {"le": INT64_MAX})
        return value

    def changed(self) -> dict[str, Any]:
        """The keys that are not at their defaults, as JSON has them: what a written file says of how it was made."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def nested_keys(cls, _key: str) -> list[str]:
        """Keys of the tables that stand under `_key`, for hints; none where values are plain."""
        return []


class LoopSettings(Settings):
    """What every recipe that reconstructs blocks has."""

    batch: int = Field(default=32, ge=1)
    """Images a step, fewer where a block's input is large (`elements`)."""
    elements: int = Field(default=2_000_000, ge=1)
    """Largest number of block-input elements a step. Early blocks have few weights and see each of them at thousands
    of places in one image, so a few images a step are enough there."""
    least_batch: int = Field(default=8, ge=1)
    """Fewest images a step, however large they are."""
    precision: Precision = "auto"
    """What blocks compute in while they are trained; losses, and what is trained, are float32 throughout. `auto` takes
    bfloat16 for blocks with a large layer on processors that multiply matrices in it (AMX), and float32 elsewhere."""
    max_chain: int = Field(default=3, ge=1)
    """Single layers in a row that are joined into one block."""
    cache_limit: float = Field(default=2.0, gt=0, exclude=True)  # which changes nothing of what is written
    """Gigabytes of memory for one value of all images, of the few that go from block to block; more lie on disk."""
    logit_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of a block's loss that is what its error does to the logits, to first order, and not the error itself.
    Of whole blocks alone: nobody asks what a layer within one does to the logits."""
    logit_directions: int = Field(default=1280, ge=1)
    """Largest logits that `logit_share` is measured in, about so many over all images, one to ten an image."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Learning rate of biases relative to the mean size of their layer's; 0 leaves them as they are."""
    compensate: bool = False
    """Begin from weights that make up for one another in closed form: rounded so (GPTQ), or taken out (OBS)."""
    compensate_places: int = Field(default=256, ge=1)
    """Output positions an image that the statistics for `compensate` are taken from."""
    compensate_inputs: int = Field(default=8192, ge=1)
    """Most weights an output channel of a layer that `compensate` works on: its statistics are that number squared."""

    @property
    def small_batch(self) -> int:
        """Images that go from block to block of the float network at once, and back for slopes.

        Always as many: kernels may round by how many there are, and a run that goes on in the middle has to come to
        the same. Slopes hold a graph of the whole network, which few images at once keep small.
        """
        return min(self.batch, self.least_batch)

    def minibatch(self, inputs: Iterable[Tensor]) -> int:
        """Images a step for a block with inputs [N, ...]."""
        return min(self.batch, max(self.least_batch, self.elements // max(1, sum(x[0].numel() for x in inputs))))


S = TypeVar("S", bound=Settings)


def recipe_names(package: str) -> list[str]:
    """Names of the recipes shipped in a package, such as `recipes.synth`."""
    return sorted(f.name.removesuffix(".toml") for f in resources.files(package).iterdir() if f.name.endswith(".toml"))


def load_recipe(
    kind: type[S], package: str, recipe: str, effort: Effort = "default", overrides: Iterable[str] = ()
) -> S:
    """Settings of a shipped recipe, or of the file that `recipe` names, with `key=value` overrides.

    Raises SettingsError, naming the nearest known key or recipe.
    """
    text, where = recipe_text(package, recipe)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where} is not valid TOML ({error}): correct it") from error
    efforts = values.pop("effort", {})
    _known_keys(kind, values, where)
    if not isinstance(efforts, dict):
        raise SettingsError(f"{where}: effort must be tables such as [effort.fast]: correct it")
    for name, table in efforts.items():
        if name not in ("fast", "default", "paper"):
            raise SettingsError(f"{where}: there is no effort {name!r}: use fast, default or paper")
        if not isinstance(table, dict):
            raise SettingsError(f"{where}: [effort.{name}] must be a table of keys: correct it")
        _known_keys(kind, table, f"{where}, effort {name}")
    values |= efforts.get(effort, {})
    given = set()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {override}: write it as key=value")
        _known_keys(kind, {key: value}, "--set")
        values[key] = _parse(value)
        given.add(key)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = "--set" if first["loc"] and first["loc"][0] in given else where
        if first["type"] == "missing":
            raise SettingsError(f"{where}: the key {key!r} is missing: add it") from error
        if first["type"] == "extra_forbidden":
            known = kind.nested_keys(str(first["loc"][0]))
            raise SettingsError(
                f"{where}: unknown key {key!r}{nearest(str(first['loc'][-1]), known)}: correct or remove it"
            ) from error
        raise SettingsError(f"{where}: {key} cannot be {first['input']!r} ({first['msg']}): correct it") from error


def recipe_text(package: str, recipe: str) -> tuple[str, str]:
    """What the shipped recipe of that name, or the file `recipe`, holds, and what to call it in messages.

    Raises SettingsError, naming the nearest recipe.
    """
    path = Path(recipe)
    shipped = recipe in recipe_names(package)  # which a file of that name does not take the place of
    if not shipped and (recipe.endswith(".toml") or path.is_file()):
        if not path.is_file():
            raise SettingsError(f"recipe {recipe} does not exist: name a .toml file or one of {_listed(package)}")
        try:
            return path.read_text(encoding="utf-8-sig"), str(path)
        except (OSError, UnicodeDecodeError):
            raise SettingsError(f"recipe {recipe} is not a readable text file: name a .toml file") from None
    if not shipped:
        hint = nearest(recipe, recipe_names(package))
        raise SettingsError(f"there is no recipe {recipe!r}{hint}: choose one of {_listed(package)}")
    return resources.files(package).joinpath(f"{recipe}.toml").read_text(encoding="utf-8"), f"recipe {recipe}"


def _known_keys(kind: type[Settings], values: dict[str, Any], where: str) -> None:
    unknown = [key for key in values if key not in kind.model_fields]
    if not unknown:
        return
    first = f"{unknown[0]!r}{nearest(unknown[0], kind.model_fields)}"
    if len(unknown) == 1:
        raise SettingsError(f"{where}: unknown key {first}: correct or remove it")
    raise SettingsError(
        f"{where}: {len(unknown)} unknown keys, such as {first}: correct or remove them, or give a recipe of this"
        " command if it is another's"
    )


def _listed(package: str) -> str:
    return ", ".join(recipe_names(package))


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value

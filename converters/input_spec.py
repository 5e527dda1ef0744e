"""How pixels become a model's input: the one place that knows.

An image batch is canonical everywhere else: float32 [N, C, H, W] in pixel range [0, 1], RGB or gray. `InputSpec` turns
it into what one model was trained on: resize, channel order, `scale`, mean and standard deviation, layout.

Sources, key by key, first that applies: options, `MODEL.toml` beside `MODEL.onnx` (table `[input]`), the file's own
metadata (`mixmix.input.*`), detection (`converters.detect`), and otherwise an assumption that says so. A source speaks
of pixel values when it has `mean`, `std` or `scale`; one that has none of them leaves those to the next.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator
from torch import Tensor

from converters.errors import SpecError, nearest
from converters.outputs import beside

METADATA_PREFIX = "mixmix.input."
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

TEXT_KEYS = ("labels", "layout")  # never numbers or lists, whatever their text looks like
MOST_CHANNELS = 4096

PIXEL_KEYS = ("mean", "std", "scale")
ASSUMED_SIDE = 224
SHAPES = {
    "size": "it is [height, width], such as [224, 224], both positive",
    "channels": f'it is "rgb", "bgr", "gray", or a number from 1 to {MOST_CHANNELS}',
}
"""How keys are written that a validator has no plain words for."""
ASSUMED = ("source", "assumed")
"""Beside the keys in a file's metadata: whoever wrote them did not know."""

Source = Literal["options", "sidecar", "metadata", "detected", "assumed"]
Channels = Literal["rgb", "bgr", "gray"] | Annotated[int, Field(ge=1, le=MOST_CHANNELS, strict=True)]


class InputSpec(BaseModel):
    """Input specification of one model.

    `size` is (height, width) in pixels; `scale` is what pixel value 1.0 becomes before mean and std, 1 or 255; `mean`
    and `std` have one entry a channel, in the model's channel order. `labels` names the label space; `offset` is 1
    where class 0 is a background class. `source` tells where the specification came from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[int, int]
    channels: Channels = "rgb"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    scale: FiniteFloat = Field(default=1.0, gt=0)
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    labels: str | None = None
    offset: int = Field(default=0, ge=0)
    source: Source = "assumed"

    @field_validator("size")
    @classmethod
    def _positive(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            raise ValueError("height and width must be positive")
        return size

    @field_validator("std")
    @classmethod
    def _nonzero(cls, std: tuple[float, ...]) -> tuple[float, ...]:
        if min(std, default=1.0) <= 0:
            raise ValueError("standard deviations must be positive")
        return std

    def model_post_init(self, _context: Any) -> None:
        if not len(self.mean) == len(self.std) == self.channel_count:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} entries for {self.channel_count} channels"
            )

    @property
    def channel_count(self) -> int:
        """Number of channels, both of the canonical image and of the model's input."""
        return _channel_count(self.channels)

    def to_input(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Canonical images [N, C, H, W] in [0, 1] to the model's input, differentiably.

        The images are brought to `size`, by default the model's own (a model run below its full resolution gets a
        smaller one). Raises SpecError when the channels cannot be adapted.
        """
        size = size or self.size
        if tuple(images.shape[-2:]) != size:
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        images = self._adapt_channels(images)
        mean, std = (_by_channel(values, images.device, images.dtype) for values in (self.mean, self.std))
        normalised = (images * self.scale - mean) / std
        return normalised if self.layout == "NCHW" else normalised.permute(0, 2, 3, 1)

    def _adapt_channels(self, images: Tensor) -> Tensor:
        have, want = images.shape[1], self.channel_count
        if have == 1 and want == 3:
            images = images.expand(-1, 3, -1, -1)
        elif have == 3 and want == 1:
            images = (images * _by_channel(LUMA, images.device, images.dtype)).sum(1, keepdim=True)
        elif have != want:
            raise SpecError(f"images have {have} channels and the model takes {want}: give images that fit the model")
        return images.flip(1) if self.channels == "bgr" else images

    def to_metadata(self) -> dict[str, str]:
        """The ONNX `metadata_props` entries that `read_metadata` reads back; `source` only where it was assumed."""
        values = self.model_dump(exclude=set() if self.source == "assumed" else {"source"}, exclude_none=True)
        return {
            METADATA_PREFIX + key: value if isinstance(value, str) else json.dumps(value)
            for key, value in values.items()
        }


@lru_cache(64)
def _by_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, C, 1, 1]. Sent once: a GPU is waited for where a few numbers go to it in each step."""
    with torch.inference_mode(False):  # of whoever asked first
        return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def _channel_count(channels: object) -> int:
    """How many channels a spec's `channels` means; 3 for what is none."""
    if isinstance(channels, int):
        return min(max(channels, 1), MOST_CHANNELS)
    return 1 if channels == "gray" else 3


@dataclass(frozen=True)
class Detection:
    """What a model itself says of its input: the spec's keys, how sure that is (0 to 1), and what comes second."""

    keys: Mapping[str, Any]
    name: str
    confidence: float
    runner_up: str | None
    evidence: str


def read_sidecar(model_path: Path) -> dict[str, Any] | None:
    """Table `[input]` of `MODEL.toml` beside `MODEL.onnx`, or None where there is no such file."""
    path = beside(model_path, "toml")
    try:
        if not path.is_file():
            return None
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))["input"]
    except OSError as error:
        raise SpecError(f"{path} cannot be read ({error.strerror}): check its permissions or remove it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid TOML ({error}): mend it or remove it") from error
    except KeyError:
        raise SpecError(f"{path} has no table [input]: add one or remove the file") from None
    if not isinstance(table, dict):
        raise SpecError(f"{path}: [input] must be a table: write keys such as size and mean below it")
    return table


def read_metadata(properties: Mapping[str, str]) -> dict[str, Any]:
    """Input-spec entries of a model's `metadata_props`; lists and numbers are JSON, anything else is text."""
    found: dict[str, Any] = {}
    for key, text in properties.items():
        name = key.removeprefix(METADATA_PREFIX)
        if name == key:
            continue
        try:
            found[name] = text if name in TEXT_KEYS else json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def stated_keys(
    model_path: Path, properties: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The input-spec keys that somebody wrote down: the file's, the sidecar's over them, and options over those."""
    return _stated(_given(options), read_sidecar(model_path), read_metadata(properties))


def _given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (options or {}).items() if value is not None}


def _stated(given: Mapping[str, Any], sidecar: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if ASSUMED in metadata.items():  # then these are no better than what would be assumed again
        metadata = {key: value for key, value in metadata.items() if key not in (*PIXEL_KEYS, "source")}
    sidecar = sidecar or {}
    if any(key in sidecar for key in PIXEL_KEYS):  # of one source, or a mean would meet another's scale
        metadata = {key: value for key, value in metadata.items() if key not in PIXEL_KEYS}
    return {**metadata, **sidecar, **given}


def resolve(
    model_path: Path,
    shape: Sequence[int | None],
    properties: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    detected: Mapping[str, Any] | None = None,
    open_size: tuple[int, int] | None = None,
) -> InputSpec:
    """The input spec of a model whose image input has `shape` (4 entries, None where the file leaves it open).

    Options override single keys of whatever the sidecar or the metadata say, and these override what was `detected`.
    Sides that nobody states are those of `open_size`.
    Raises SpecError when a key is unknown or malformed, or contradicts the shape in the file.
    """
    given, sidecar, metadata = _given(options), read_sidecar(model_path), read_metadata(properties)
    stated = _stated(given, sidecar, metadata)
    layout = stated.get("layout") or ("NHWC" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "NCHW")
    height, width, channels = (shape[axis] for axis in ((1, 2, 3) if layout == "NHWC" else (2, 3, 1)))
    sides = open_size or (ASSUMED_SIDE, ASSUMED_SIDE)
    values = (
        _assumed((height or sides[0], width or sides[1]), channels, stated)
        | {"layout": layout}
        | dict(detected or {})
        | stated
    )
    values["source"] = _source(given, sidecar, metadata, detected)
    count = _channel_count(values["channels"])
    for key in ("mean", "std"):  # one number is that of every channel
        numbers = values[key] if isinstance(values[key], (list, tuple)) else [values[key]]
        values[key] = tuple(numbers) * count if len(numbers) == 1 else tuple(numbers)
    where = f"{beside(model_path, 'toml')}" if sidecar is not None and not given else f"{model_path}"
    if "source" in stated:
        raise SpecError(f"{where}: the input spec has no key source: remove it")
    try:
        spec = InputSpec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "input"
        if first["type"] == "extra_forbidden":
            hint = nearest(key, set(InputSpec.model_fields) - {"source"})
            raise SpecError(f"{where}: the input spec has no key {key}{hint}: correct or remove it") from error
        message = SHAPES.get(key, first["msg"].removeprefix("Value error, "))
        of_key = f"'s {key}" if first["loc"] else ""
        raise SpecError(f"{where}: the input spec{of_key} cannot be used ({message}): correct it") from error
    for name, fixed, wanted in (
        ("height", height, spec.size[0]),
        ("width", width, spec.size[1]),
        ("channel count", channels, spec.channel_count),
    ):
        if fixed is not None and fixed != wanted:
            takes = f"{fixed} (read as {layout})" if "layout" in stated else f"{fixed}"
            raise SpecError(f"{where}: the input spec says {name} {wanted}, the model takes {takes}: correct the spec")
    other = shape[1] if layout == "NHWC" else shape[3]
    if "layout" in stated and "channels" not in stated and other in (1, 3) and channels not in (1, 3, None):
        raise SpecError(
            f"{where}: by layout {layout} its images have {channels} channels, by the other layout {other}:"
            f" correct the layout, or say channels = {channels} too"
        )
    return spec


def _source(
    given: Mapping[str, Any],
    sidecar: Mapping[str, Any] | None,
    metadata: Mapping[str, Any],
    detected: Mapping[str, Any] | None,
) -> Source:
    """Who says how pixel values become numbers."""
    sources: tuple[tuple[Source, Mapping[str, Any]], ...] = (
        ("options", given),
        ("sidecar", sidecar or {}),
        ("metadata", metadata if ASSUMED not in metadata.items() else {}),
        ("detected", detected or {}),
    )
    return next((name for name, keys in sources if any(key in keys for key in PIXEL_KEYS)), "assumed")


def _assumed(size: tuple[int, int], channels: int | None, stated: Mapping[str, Any]) -> dict[str, Any]:
    """What to believe of a model that says nothing: ImageNet for 3 channels, half and half otherwise."""
    named = stated.get("channels")
    if channels is not None:
        count = channels
    elif isinstance(named, int) and 1 <= named <= MOST_CHANNELS:
        count = named
    else:
        count = 1 if named == "gray" else 3
    values: dict[str, Any] = {"size": size}
    scale = stated.get("scale")
    unit = float(scale) if isinstance(scale, (int, float)) and not isinstance(scale, bool) else 1.0
    if count == 3:
        mean, std = (v[::-1] if named == "bgr" else v for v in (IMAGENET_MEAN, IMAGENET_STD))
        return values | {"channels": "rgb", "mean": _times(unit, mean), "std": _times(unit, std)}
    half = _times(unit, (0.5,) * count)
    return values | {"channels": "gray" if count == 1 else count, "mean": half, "std": half}


def _times(unit: float, values: Sequence[float]) -> tuple[float, ...]:
    return tuple(unit * value for value in values)

"""Units of a file's inner values: where its channels are counted in others than those of the model it was made from.

Equalisation (`recipes.quantize.equalise`) divides channels where they are made and multiplies them where they are read;
between the two, a value is in another unit than the value of the same name in the original. The file says which, so
that the two can be compared: metadata `mixmix.units` is a list of `{values: [name...], steps: [integer...]}`, one
integer for each channel along axis 1, or for each run of equally many entries of it where a map has been flattened. An
entry of the original's value is the file's times 2^(steps / 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from converters.classifier import Classifier
from converters.errors import MixMixError

KEY = "mixmix.units"
STEPS_PER_OCTAVE = 4


class Rescaled(BaseModel):
    """Values that have their channels in the same units."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    values: list[str]
    steps: list[int]

    @property
    def factors(self) -> NDArray[np.float32]:
        """What the file's channels [C] are multiplied with to be the original's."""
        return np.exp2(np.array(self.steps, np.float32) / STEPS_PER_OCTAVE)


_LIST = TypeAdapter(list[Rescaled])


def to_metadata(rescaled: Sequence[Rescaled]) -> dict[str, str]:
    """The metadata entry; none where all values are in the original's units."""
    return {KEY: _LIST.dump_json(list(rescaled)).decode()} if rescaled else {}


class Units:
    """The units of a classifier's inner values. Raises MixMixError where the file's metadata cannot be read."""

    def __init__(self, classifier: Classifier) -> None:
        text = classifier.original.metadata_props.get(KEY, "[]")
        try:
            found = _LIST.validate_json(text)
        except ValidationError as error:
            raise MixMixError(
                f"{classifier.path}: metadata {KEY} is not a list of values and steps, and without it values that were"
                " equalised cannot be compared: take the file as MixMix wrote it, or remove the entry"
            ) from error
        self._factors = {name: each.factors for each in found for name in each.values}

    def original(self, values: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Values by name [N, C * n, ...], from the file's units to the original's."""
        return {name: self._times(name, value, 1) for name, value in values.items()}

    def own(self, name: str, value: NDArray[np.generic]) -> NDArray[np.generic]:
        """The value of that name, from the original's units to the file's."""
        return self._times(name, value, -1)

    def _times(self, name: str, value: NDArray[np.generic], power: int) -> NDArray[np.generic]:
        factors = self._factors.get(name)
        if factors is None or value.ndim < 2 or value.shape[1] % len(factors):
            return value
        each = np.repeat(factors**power, value.shape[1] // len(factors))
        return (value.astype(np.float64) * each.reshape(-1, *[1] * (value.ndim - 2))).astype(value.dtype)

"""What `prune` is asked for, checked before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import MixMixError
from converters.outputs import beside
from recipes.patterns import CHANNEL, NofM, Pattern, Unstructured, WholeChannels, parse_n_of_m

if TYPE_CHECKING:
    from recipes.images import ImageSet

PROVENANCE = "mixmix.prune"
"""Metadata key of a pruned file."""
WEIGHTS, MACS, LATENCY = "weights", "macs", "latency"
"""Units of a budget for whole channels."""
LETTERS = {WEIGHTS: "c", MACS: "m", LATENCY: "t"}
"""What a file's name says of which of them are gone, in per cent."""


@dataclass(frozen=True)
class Goal:
    """The pattern, and how much is to go."""

    pattern: Pattern | WholeChannels
    sparsity: float
    """The share of all layers' weights to remove; for whole channels 1 less the share of the weights, of the
    multiplications or of the time that is left, as `unit` says."""
    unit: str = WEIGHTS
    everywhere: bool = False
    """Whether every layer gets an N:M pattern that it fits, and not only as many as `sparsity` needs."""

    def to_json(self, images: ImageSet, seed: int, **found: object) -> str:
        """What the file's metadata says under PROVENANCE, with what was `found` on the way."""
        return json.dumps(
            {
                "pattern": self.pattern.name,
                "sparsity": self.sparsity,
                "of": self.unit,
                "images": len(images),
                "seed": seed,
                **found,
            }
        )


def make_goal(pattern: str, sparsity: float | None, macs: float | None = None, latency: float | None = None) -> Goal:
    """The goal of `--pattern`, `--sparsity`, `--macs` and `--latency`. Raises MixMixError for what cannot be meant."""
    if macs is not None:
        return _budget(pattern, MACS, macs, {"--sparsity": sparsity, "--latency": latency})
    if latency is not None:
        return _budget(pattern, LATENCY, latency, {"--sparsity": sparsity})
    if sparsity is not None and not 0 < sparsity < 1:
        raise MixMixError(f"--sparsity {sparsity:g} cannot be used: choose a share above 0 and below 1")
    if pattern in ("unstructured", CHANNEL):
        if sparsity is None:
            other = ", or --macs or --latency, what is to be left of them" if pattern == CHANNEL else ""
            raise MixMixError(f"how much to remove is not said: give --sparsity, such as 0.5{other}")
        return Goal(Unstructured() if pattern == "unstructured" else WholeChannels(), sparsity)
    try:
        n_of_m = parse_n_of_m(pattern)
    except MixMixError as error:
        raise MixMixError(f"{error}, or unstructured, or channel") from error
    if sparsity is None:
        return Goal(n_of_m, n_of_m.share, everywhere=True)
    if sparsity > n_of_m.share:
        raise MixMixError(
            f"--pattern {pattern} removes {n_of_m.share:g} of a layer, and --sparsity {sparsity:g} is more: ask for"
            " less, or leave it out for every layer that the pattern fits"
        )
    return Goal(n_of_m, sparsity)


def _budget(pattern: str, unit: str, left: float, others: Mapping[str, float | None]) -> Goal:
    """Whole channels down to `left` of a unit; `others` are what cannot be asked for besides."""
    if pattern != CHANNEL:
        raise MixMixError(f"--{unit} is a budget for whole channels, not for pattern {pattern}: use --pattern channel")
    for name, value in others.items():
        if value is not None:
            raise MixMixError(f"--{unit} says how much is to be left, instead of {name}: leave one of them out")
    if not 0 < left < 1:
        raise MixMixError(f"--{unit} {left:g} cannot be used: choose the share to leave, above 0 and below 1")
    return Goal(WholeChannels(), 1 - left, unit)


def output_path(model: Path, goal: Goal, bits: int | None = None, act_bits: int | None = None) -> Path:
    """`model.s50.onnx`, `model.2of4.onnx`, `model.2of4.s30.onnx` or `model.c50.onnx`, beside the input.

    Of whole channels, c, m and t are weights, multiplications and time that are gone. With bits, `model.s50.w4.onnx` or
    `model.s50.w4a8.onnx`.
    """
    pattern, parts = goal.pattern, []
    if isinstance(pattern, NofM):
        parts.append(f"{pattern.n}of{pattern.m}")
    if not goal.everywhere:
        letter = LETTERS[goal.unit] if isinstance(pattern, WholeChannels) else "s"
        parts.append(f"{letter}{round(100 * goal.sparsity, 6):g}")
    if bits is not None:
        parts.append(f"w{bits}{'' if act_bits is None else f'a{act_bits}'}")
    return beside(model, f"{'.'.join(parts)}.onnx")

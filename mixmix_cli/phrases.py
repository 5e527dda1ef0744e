"""Words and figures that both the terminal and the report use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

SIGNIFICANT = 0.05
"""p-value up to which two sets are said to differ."""
LABELS = {
    "real": "accuracy against real labels",
    "targets": "labels are synthesis targets, not ground truth: agreement is reported, not accuracy",
    "none": "no labels: agreement is reported, not accuracy",
}
"""What figures on a set are worth, by the kind of its labels."""


class PixelArithmetic(Protocol):
    """How a model takes pixel values in [0, 1]: times `scale`, less `mean`, by `std`."""

    @property
    def scale(self) -> float: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def pixels(spec: PixelArithmetic) -> str:
    """What is done to pixel values in [0, 1]."""
    scale = f"x {spec.scale:g}, " if spec.scale != 1 else ""
    return f"{scale}mean {_figures(spec.mean)}, std {_figures(spec.std)}"


def likeness(p_value: float, permutations: int) -> str:
    """What a permutation test says of two image sets, behind its p-value."""
    verdict = "one distribution cannot be ruled out" if p_value > SIGNIFICANT else "they differ"
    return f"(least possible {1 / (permutations + 1):.3f}): {verdict}"


def _figures(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)

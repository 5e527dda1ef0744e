"""One value seen by an observer."""

from __future__ import annotations

from torch import Tensor

from recipes.synth.statistics import Observer, Statistics


def observe(x: Tensor, axis: int = 1) -> tuple[Tensor, Statistics]:
    """x [N, C, ...] as it goes on, and its statistics; [N, ..., C] with -1 for the axis."""
    observer = Observer({"x": axis})
    y = observer.transforms["x"](x)
    return y, observer.statistics["x"]

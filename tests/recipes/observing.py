"""One value seen by an observer."""

from __future__ import annotations

from torch import Tensor

from recipes.synth.statistics import Observer, Statistics


def observe(x: Tensor) -> tuple[Tensor, Statistics]:
    """x [N, C, ...] as it goes on, and its statistics."""
    observer = Observer(["x"])
    y = observer.transforms["x"](x)
    return y, observer.statistics["x"]

"""Numbers that stand for channels: some become one as more is known, and some are fixed.

A grid holds numbers along the axes of a value: it has the value's rank, and size 1 along axes at whose every place the
channels are the same ones. The feature map of a convolution [1, C, H, W] has a grid [1, C, 1, 1]; what a projection's
T tokens become when they are split into heads, [1, T, heads, D], has a grid [1, 1, heads, D].
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
FIXED = 0
"""The number of whatever must stay."""


class Numbering:
    """Numbers in use, and which of them are one: a union-find whose least member stands for the others."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)

    def fresh(self, count: int) -> Numbers:
        """As many new numbers [count]."""
        start = len(self._parent)
        new = np.arange(start, start + count)
        self._parent = np.concatenate([self._parent, new])
        return new

    def roots(self, numbers: Numbers) -> Numbers:
        """What stands for each of the numbers, in their shape."""
        roots = self._parent[numbers]
        while not np.array_equal(roots, self._parent[roots]):
            roots = self._parent[roots]
        return roots

    def join(self, a: Numbers, b: Numbers) -> None:
        """Make channels one, pair by pair of what is broadcast; FIXED is the least number, so that it wins."""
        pairs = np.stack(np.broadcast_arrays(self.roots(a), self.roots(b)), -1).reshape(-1, 2)
        for one, other in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
            low, high = sorted((int(self.roots(one)), int(self.roots(other))))
            self._parent[high] = low

    def fix(self, numbers: Numbers) -> None:
        self._parent[self.roots(numbers)] = FIXED

    def varying(self, grid: Numbers) -> list[int]:
        """The axes along which a grid has different numbers."""
        roots = self.roots(grid)
        return [axis for axis in range(grid.ndim) if not (roots == roots.take([0], axis)).all()]

    def level(self, grid: Numbers, axes: Iterable[int]) -> None:
        """Make one what lies along these axes, so that the grid varies along others alone."""
        for axis in axes:
            self.join(grid, grid.take([0], axis))

    def narrow(self, numbers: Numbers) -> Numbers:
        """The grid of a value whose elements have these numbers."""
        varying = self.varying(numbers)
        return numbers[tuple(slice(None) if axis in varying else slice(0, 1) for axis in range(numbers.ndim))]

    def line(self, grid: Numbers, axis: int) -> Numbers | None:
        """What stands along one axis of a grid; None where the grid varies along others."""
        if set(self.varying(grid)) - {axis}:
            return None
        return self.roots(np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0])


def along(numbers: Numbers, axis: int, rank: int) -> Numbers:
    """The grid of a value of this rank that has `numbers` [C] along one axis."""
    return numbers.reshape([-1 if each == axis else 1 for each in range(rank)])

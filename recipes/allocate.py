"""One choice a layer under one budget: the multiple-choice knapsack behind allocated sparsity and mixed precision.

    minimise  sum_l harm[l][c_l]   subject to   sum_l cost[l][c_l] <= budget

Layer by layer, only those sums are carried on that no other beats in both cost and harm (the Pareto frontier). That is
exact; where the frontier grows past LIMIT, the least harm of each of LIMIT equal steps of cost is carried on, with its
own exact cost, so the budget is kept and what is lost is less than a step's worth of cost a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.errors import MixMixError

LIMIT = 5000
ROUNDING = 1e-9  # of the budget: sums of costs are compared as if exact

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What one choice costs (in the budget's unit) and how much harm it does (any unit that adds up)."""

    cost: float
    harm: float


@dataclass(frozen=True)
class _Sums:
    """Sums of one choice of each layer, by rising cost and falling harm, and what each is made of."""

    cost: Floats
    harm: Floats
    history: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
    """Layer by layer, for every sum: which one it goes on from, and which choice it adds."""

    def indices(self, state: int) -> list[int]:
        """The choice of each layer in the sum at `state`."""
        found = []
        for before, taken in reversed(self.history):
            found.append(int(taken[state]))
            state = int(before[state])
        return found[::-1]


def allocate(choices: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """The index of the choice of each layer. Raises MixMixError when even the cheapest exceed the budget."""
    least = sum(min(choice.cost for choice in row) for row in choices)
    if least > budget * (1 + ROUNDING):
        raise MixMixError(f"the budget of {budget:g} is below what the cheapest choices cost, {least:g}: allow more")
    sums = _add_up(choices, budget)
    return sums.indices(int(sums.harm.argmin()))


def frontier(choices: Sequence[Sequence[Choice]]) -> list[tuple[Choice, list[int]]]:
    """All that is worth choosing of several layers together: what it costs and harms, and the index for each layer."""
    sums = _add_up(choices, math.inf)
    return [
        (Choice(float(cost), float(harm)), sums.indices(state))
        for state, (cost, harm) in enumerate(zip(sums.cost, sums.harm, strict=True))
    ]


def _add_up(choices: Sequence[Sequence[Choice]], budget: float) -> _Sums:
    cheapest = [min(choice.cost for choice in row) for row in choices]
    cost, harm = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for index, row in enumerate(choices):
        room = budget * (1 + ROUNDING) - sum(cheapest[index + 1 :])
        costs = cost[:, None] + np.array([choice.cost for choice in row])
        harms = harm[:, None] + np.array([choice.harm for choice in row])
        kept = _frontier(costs.ravel(), harms.ravel(), room)
        cost, harm = costs.ravel()[kept], harms.ravel()[kept]
        before, taken = np.unravel_index(kept, costs.shape)
        history.append((before, taken))
    return _Sums(cost, harm, history)


def _frontier(cost: Floats, harm: Floats, room: float) -> NDArray[np.intp]:
    """Indices of the sums within `room` that no other beats, by rising cost and falling harm."""
    order = np.lexsort((harm, cost))
    order = order[cost[order] <= room]
    least = np.minimum.accumulate(harm[order])
    order = order[np.append(True, harm[order][1:] < least[:-1])]
    if len(order) <= LIMIT:
        return order
    steps = ((cost[order] - cost[order[0]]) / (cost[order[-1]] - cost[order[0]]) * LIMIT).astype(np.int64)
    return order[np.append(steps[1:] != steps[:-1], True)]  # the last of a step does the least harm

"""One choice a layer under one budget: the multiple-choice knapsack behind allocated sparsity and mixed precision.

    minimise  sum_l harm[l][c_l]   subject to   sum_l cost[l][c_l] <= budget

Layer by layer, only those sums are carried on that no other beats in both cost and harm (the Pareto frontier). That is
exact; where the frontier grows past LIMIT, the least harm of each of LIMIT equal steps of cost is carried on, with its
own exact cost, so the budget is kept and what is lost is less than a step's worth of cost a layer.
"""

from __future__ import annotations

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


def allocate(choices: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """The index of the choice of each layer. Raises MixMixError when even the cheapest exceed the budget."""
    cheapest = [min(choice.cost for choice in row) for row in choices]
    if sum(cheapest) > budget * (1 + ROUNDING):
        raise MixMixError(
            f"the budget of {budget:g} is below what the cheapest choices cost, {sum(cheapest):g}: allow more"
        )
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
    state, found = int(harm.argmin()), []
    for before, taken in reversed(history):
        found.append(int(taken[state]))
        state = int(before[state])
    return found[::-1]


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

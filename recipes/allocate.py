"""One choice a layer under one budget: the multiple-choice knapsack behind allocated sparsity and mixed precision.

    minimise  sum_l harm[l][c_l]   subject to   sum_l cost[l][c_l] <= budget

solved exactly by SciPy's branch and bound (HiGHS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from converters.errors import MixMixError


@dataclass(frozen=True)
class Choice:
    """What one choice costs (in the budget's unit) and how much harm it does (any unit that adds up)."""

    cost: float
    harm: float


def allocate(choices: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """The index of the choice of each layer. Raises MixMixError when even the cheapest exceed the budget."""
    least = sum(min(choice.cost for choice in row) for row in choices)
    if least > budget:
        raise MixMixError(f"the budget of {budget:g} is below what the cheapest choices cost, {least:g}: allow more")
    flat = [(index, choice) for index, row in enumerate(choices) for choice in row]
    harm = np.array([choice.harm for _, choice in flat])
    cost = np.array([[choice.cost for _, choice in flat]])
    rows = np.array([index for index, _ in flat])
    one_each = coo_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(choices), len(flat)))
    scale = max(budget, 1e-12)
    found = milp(
        harm / max(harm.max(), 1e-300),
        integrality=np.ones(len(flat)),
        bounds=(0, 1),
        constraints=[LinearConstraint(cost / scale, ub=budget / scale), LinearConstraint(one_each, 1, 1)],
    )
    if found.x is None:
        raise MixMixError(f"no allocation was found ({found.message}): choose another budget")
    taken = found.x > 0.5
    ends = np.cumsum([len(row) for row in choices])
    return [int(np.flatnonzero(part)[0]) for part in np.split(taken, ends[:-1])]

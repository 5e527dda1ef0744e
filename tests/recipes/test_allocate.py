"""Allocation is exact: compared with trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import MixMixError
from recipes.allocate import Choice, allocate, frontier

ROWS = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 20).map(float), st.integers(0, 50).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def test_a_thinned_frontier_keeps_the_budget_and_stays_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rows = [
        [Choice(bits * size, size * harm * 4.0**-bits) for bits in range(2, 9)] for size, harm in random.random((30, 2))
    ]
    budget = 4.3 * sum(row[0].cost / 2 for row in rows)

    def result() -> tuple[float, float]:
        taken = [row[index] for row, index in zip(rows, allocate(rows, budget), strict=True)]
        return sum(choice.cost for choice in taken), sum(choice.harm for choice in taken)

    cost, fine = result()
    assert cost <= budget * (1 + 1e-8)
    monkeypatch.setattr("recipes.allocate.LIMIT", 200)
    cost, coarse = result()
    assert cost <= budget * (1 + 1e-8)
    assert fine <= coarse < 1.1 * fine
    uniform = sum(row[2].harm for row in rows)
    assert coarse < uniform


@settings(max_examples=60)
@given(rows=ROWS, budget=st.integers(0, 60))
def test_no_other_allocation_within_the_budget_does_less_harm(rows: list[list[Choice]], budget: int) -> None:
    within = [
        sum(choice.harm for choice in taken)
        for taken in itertools.product(*rows)
        if sum(choice.cost for choice in taken) <= budget
    ]
    if not within:
        with pytest.raises(MixMixError, match="budget"):
            allocate(rows, budget)
        return
    chosen = [row[index] for row, index in zip(rows, allocate(rows, budget), strict=True)]
    assert sum(choice.cost for choice in chosen) <= budget + 1e-6
    assert sum(choice.harm for choice in chosen) == pytest.approx(min(within), abs=1e-6)


@settings(max_examples=60)
@given(rows=ROWS)
def test_the_frontier_is_what_no_other_sum_beats(rows: list[list[Choice]]) -> None:
    sums = {
        (sum(choice.cost for choice in taken), sum(choice.harm for choice in taken))
        for taken in itertools.product(*rows)
    }
    best = {(c, h) for c, h in sums if not any(x <= c and y <= h and (x, y) != (c, h) for x, y in sums)}
    found = frontier(rows)
    assert {(choice.cost, choice.harm) for choice, _ in found} == best
    assert len(found) == len(best)
    for choice, indices in found:
        taken = [row[index] for row, index in zip(rows, indices, strict=True)]
        assert choice == Choice(sum(c.cost for c in taken), sum(c.harm for c in taken))

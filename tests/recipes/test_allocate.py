"""Allocation is exact: compared with trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import MixMixError
from recipes.allocate import Choice, allocate

ROWS = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 20).map(float), st.integers(0, 50).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
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

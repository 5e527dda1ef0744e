"""Sparsity patterns as pure functions, against independent counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import MixMixError
from converters.torch_module import Layer
from recipes.patterns import NofM, Unstructured, keep_largest, keep_n_of_m, obeys_n_of_m, parse_n_of_m

SEEDS = st.integers(0, 2**31)


def sizes(seed: int, *shape: int) -> torch.Tensor:
    """Absolute values, with ties among them."""
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(seed=SEEDS, count=st.integers(1, 60), share=st.floats(0, 1))
def test_keep_largest_removes_an_exact_number_of_the_smallest(seed: int, count: int, share: float) -> None:
    size = sizes(seed, count)
    kept = keep_largest(size, share)
    assert int((~kept).sum()) == round(share * count)
    if kept.any() and not kept.all():
        assert float(size[kept].min()) >= float(size[~kept].max())


@given(seed=SEEDS, m=st.integers(2, 6), groups=st.integers(1, 4), axis=st.sampled_from([0, 1]), data=st.data())
def test_keep_n_of_m_keeps_the_n_largest_of_every_group(
    seed: int, m: int, groups: int, axis: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    shape = [3, 3, 2, 1]
    shape[axis] = m * groups
    size = sizes(seed, *shape)
    kept = keep_n_of_m(size, n, m, axis)
    assert kept.shape == size.shape
    values, masks = (np.moveaxis(t.numpy(), axis, -1).reshape(-1, m) for t in (size, kept))
    for row, mask in zip(values, masks, strict=True):
        assert mask.sum() == n
        assert row[mask].min() >= row[~mask].max()
    assert obeys_n_of_m(torch.where(kept, size, 0.0), n, m, axis)


def test_one_weight_too_many_breaks_the_pattern() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])
    assert obeys_n_of_m(weight, 2, 4, 1)
    weight[0, 1] = 1
    assert not obeys_n_of_m(weight, 2, 4, 1)
    assert not obeys_n_of_m(torch.zeros(1, 6), 2, 4, 1)  # four does not divide six


def layer(shape: tuple[int, ...], axis: int) -> Layer:
    return Layer("layer", "Conv", "x", "y", "w", None, axis, shape)


@pytest.mark.parametrize(
    ("shape", "axis", "fits"),
    [((8, 4, 3, 3), 0, True), ((8, 1, 3, 3), 0, False), ((6, 8), 1, False), ((8, 6), 1, True)],
)
def test_n_of_m_fits_where_m_divides_the_input_channels(shape: tuple[int, ...], axis: int, fits: bool) -> None:
    assert NofM(2, 4).fits(layer(shape, axis)) is fits
    assert Unstructured().fits(layer(shape, axis))


def test_n_of_m_runs_along_the_input_channels_of_every_layout() -> None:
    size = sizes(0, 8, 4)
    rows_first = NofM(2, 4).choose(size, layer((8, 4), 0), 0.5)
    columns_first = NofM(2, 4).choose(size.T.contiguous(), layer((4, 8), 1), 0.5)
    assert torch.equal(rows_first, columns_first.T)
    assert NofM(2, 4).obeyed_by(torch.where(rows_first, size, 0.0), layer((8, 4), 0))


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2", "a:b", "2:4:8", "", "-1:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(MixMixError, match="not a pattern"):
        parse_n_of_m(text)


def test_patterns_say_their_names() -> None:
    assert parse_n_of_m("2:4") == NofM(2, 4)
    assert (NofM(2, 4).name, NofM(1, 4).share, Unstructured().name) == ("2:4", 0.75, "unstructured")

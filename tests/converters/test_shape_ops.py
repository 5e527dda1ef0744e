"""Operators in which shapes and axes matter, over many of both, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from converters.ops import registry
from tests.converters.oracle import Array, check, ints
from tests.models import random

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
ONES = st.lists(st.booleans(), min_size=4, max_size=4)


def with_ones(sizes: list[int], ones: list[bool]) -> list[int]:
    """A shape that broadcasts with `sizes`: a 1 here and there."""
    return [1 if one else size for size, one in zip(sizes, ones, strict=False)]


@given(data=st.data(), sizes=SIZES)
@QUICK
def test_slice(data: st.DataObject, sizes: list[int]) -> None:
    """Bounds inside and far outside, steps either way, axes from either end, in any order."""
    rank = len(sizes)
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    bound = st.integers(-6, 6) | st.sampled_from([2**63 - 1, -(2**63)])
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
    axes = [axis - data.draw(st.sampled_from([0, rank])) for axis in axes]
    operands = [ints(*starts), ints(*ends), ints(*axes), ints(*steps)]
    check("Slice", [random(*sizes), *operands], opset=data.draw(st.sampled_from([10, 11, 13])), tolerance=0)


@given(data=st.data(), sizes=SIZES, shape=st.lists(st.integers(0, 3), max_size=3))
@QUICK
def test_gather(data: st.DataObject, sizes: list[int], shape: list[int]) -> None:
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    limit = sizes[axis]
    indices = np.random.default_rng(0).integers(-limit, limit, shape)
    check("Gather", [random(*sizes), np.array(indices)], opset=13, tolerance=0, axis=axis)


@given(data=st.data(), sizes=SIZES, shape=st.lists(st.integers(1, 3), max_size=2))
@QUICK
def test_gather_nd(data: st.DataObject, sizes: list[int], shape: list[int]) -> None:
    batch = data.draw(st.integers(0, len(sizes) - 1))
    depth = data.draw(st.integers(1, len(sizes) - batch))
    limits = sizes[batch : batch + depth]
    generator = np.random.default_rng(0)
    indices = np.stack([generator.integers(-n, n, sizes[:batch] + shape) for n in limits], -1)
    check("GatherND", [random(*sizes), indices], opset=13, tolerance=0, batch_dims=batch)


@given(data=st.data(), sizes=SIZES, op=st.sampled_from(["GatherElements", "ScatterElements"]))
@QUICK
def test_elements(data: st.DataObject, sizes: list[int], op: str) -> None:
    """Each place along the axis is written at most once, since which of two comes last is nobody's word."""
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    shape = [data.draw(st.integers(1, size)) for size in sizes]
    generator = np.random.default_rng(0)
    order = np.argsort(
        generator.random([*shape[: axis % len(sizes)], sizes[axis], *shape[axis % len(sizes) + 1 :]]), axis
    )
    indices = np.take(order, range(shape[axis]), axis) - data.draw(st.sampled_from([0, sizes[axis]]))
    operands = [random(*sizes), indices, *([random(*shape, seed=1)] if op == "ScatterElements" else [])]
    check(op, operands, opset=13, tolerance=0, axis=axis)


@given(data=st.data(), mode=st.sampled_from(["constant", "edge", "reflect"]), opset=st.sampled_from([7, 11, 13]))
@QUICK
def test_pad_of_older_files(data: st.DataObject, mode: str, opset: int) -> None:
    rank = data.draw(st.integers(1, 4))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    value = data.draw(st.sampled_from([0.0, 2.5]))
    x = random(*[4] * rank)
    if opset < 11:
        check("Pad", [x], opset=opset, tolerance=0, mode=mode, pads=pads, value=value)
    else:
        check("Pad", [x, ints(*pads), np.array(value, np.float32)], opset=opset, tolerance=0, mode=mode)


@given(data=st.data(), opset=st.sampled_from([7, 11, 13]), axis=st.integers(0, 2))
@QUICK
def test_split_of_older_files(data: st.DataObject, opset: int, axis: int) -> None:
    """In parts that are named, or as many equal ones as there are outputs."""
    parts = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    sizes = [2, 2, 2]
    sizes[axis] = sum(parts)
    operands: list[Array] = [random(*sizes)]
    attributes: dict[str, Any] = {"axis": axis}
    if opset < 13:
        attributes["split"] = parts
    else:
        operands.append(ints(*parts))
    check("Split", operands, opset=opset, outputs=len(parts), tolerance=0, **attributes)
    sizes[axis] = 2 * len(parts)
    check("Split", [random(*sizes)], opset=opset, outputs=len(parts), tolerance=0, axis=axis)


EQUATIONS = {
    "ij,jk->ik": [(3, 4), (4, 2)],
    "bhid,bhjd->bhij": [(2, 3, 4, 5), (2, 3, 6, 5)],
    "bhij , bhjd -> bihd": [(2, 3, 4, 6), (2, 3, 6, 5)],
    "...ij,...jk": [(2, 3, 4), (2, 4, 5)],
    "bnc,c->bn": [(2, 3, 4), (4,)],
    "ij->ji": [(3, 4)],
    "ii->i": [(3, 3)],
    "bij->": [(2, 3, 4)],
    "a,b,c->abc": [(2,), (3,), (4,)],
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str) -> None:
    operands = [random(*shape, seed=index) for index, shape in enumerate(EQUATIONS[equation])]
    check("Einsum", operands, opset=12, equation=equation)


@given(data=st.data(), sizes=SIZES, op=st.sampled_from(["Softmax", "LogSoftmax", "Hardmax"]))
@QUICK
def test_softmax(data: st.DataObject, sizes: list[int], op: str) -> None:
    """Along one axis from opset 13 on; before, over it and all that follow, with 1 as its default."""
    opset = data.draw(st.sampled_from([7, 11, 13]))
    axis = data.draw(st.integers(-len(sizes) if opset > 7 else 0, len(sizes) - 1))
    check(op, [random(*sizes)], opset=opset, axis=axis)
    if len(sizes) > 1:
        check(op, [random(*sizes)], opset=opset)


@given(data=st.data(), sizes=st.lists(st.integers(2, 4), min_size=1, max_size=4), bias=st.booleans())
@QUICK
def test_layer_normalization(data: st.DataObject, sizes: list[int], bias: bool) -> None:
    """Scale and bias over all that is normalised, or over its last axis only."""
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    shape = data.draw(st.sampled_from([sizes[axis:], sizes[-1:]]))
    outputs = data.draw(st.integers(1, 3))
    operands = [random(*sizes), random(*shape, seed=1), *([random(*shape, seed=2)] if bias else [])]
    check("LayerNormalization", operands, outputs=outputs, tolerance=2e-6, axis=axis, epsilon=1e-2)


@given(
    data=st.data(), heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]), flat=st.booleans(), causal=st.sampled_from([0, 1])
)
@QUICK
def test_attention(data: st.DataObject, heads: tuple[int, int], flat: bool, causal: int) -> None:
    """Of three or four dimensions, with shared keys, with masks that broadcast, some of which hide everything."""
    (q_heads, k_heads), queries, keys = heads, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    attributes: dict[str, Any] = {"is_causal": causal}
    attributes |= data.draw(st.sampled_from([{}, {"scale": 0.3}, {"softcap": 2.0}]))
    if flat:
        attributes |= {"q_num_heads": q_heads, "kv_num_heads": k_heads}
        shapes = [(2, queries, q_heads * 4), (2, keys, k_heads * 4), (2, keys, k_heads * 3)]
    else:
        shapes = [(2, q_heads, queries, 4), (2, k_heads, keys, 4), (2, k_heads, keys, 3)]
    operands: list[Array] = [random(*shape, seed=index) for index, shape in enumerate(shapes)]
    ones = data.draw(st.sampled_from([[True, True], [False, True], [False, False]]))
    mask = random(*with_ones([2, q_heads], ones), queries, keys, seed=5)
    kind = data.draw(st.sampled_from(["none", "numbers", "places"]))
    operands += [] if kind == "none" else [mask if kind == "numbers" else mask > 0]
    check("Attention", operands, opset=data.draw(st.sampled_from([23, 24])), tolerance=2e-6, **attributes)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), upper=st.sampled_from([None, 0, 1]), k=st.integers(-5, 5)
)
@QUICK
def test_trilu(sizes: list[int], upper: int | None, k: int) -> None:
    check("Trilu", [random(*sizes), np.array(k)], tolerance=0, **({} if upper is None else {"upper": upper}))


@given(sizes=SIZES, ones=st.tuples(ONES, ONES, ONES), shorter=st.integers(0, 2))
@QUICK
def test_where(sizes: list[int], ones: tuple[list[bool], ...], shorter: int) -> None:
    shapes = [with_ones(sizes, one) for one in ones]
    shapes[shorter] = shapes[shorter][1:]
    condition, *operands = (np.array(random(*shape, seed=index)) for index, shape in enumerate(shapes))
    check("Where", [np.array(condition > 0), *operands], tolerance=0)


@given(sizes=SIZES, ones=st.tuples(ONES, ONES), more=st.lists(st.integers(1, 3), max_size=2))
@QUICK
def test_expand(sizes: list[int], ones: tuple[list[bool], list[bool]], more: list[int]) -> None:
    """To a shape with more axes, or with fewer, or with ones that leave a size as it is."""
    x, shape = random(*with_ones(sizes, ones[0])), more + with_ones(sizes, ones[1])
    check("Expand", [x, ints(*shape)], tolerance=0)
    check("Expand", [random(*sizes), ints(*sizes[1:])], tolerance=0)


@given(data=st.data(), sizes=SIZES)
@QUICK
def test_tile(data: st.DataObject, sizes: list[int]) -> None:
    repeats = [data.draw(st.integers(1, 3)) for _ in sizes]
    check("Tile", [random(*sizes), ints(*repeats)], opset=data.draw(st.sampled_from([7, 13])), tolerance=0)


@given(data=st.data(), sizes=SIZES, count=st.integers(1, 3))
@QUICK
def test_concat(data: st.DataObject, sizes: list[int], count: int) -> None:
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    shapes = []
    for _ in range(count):
        shape = list(sizes)
        shape[axis] = data.draw(st.integers(0, 3))
        shapes.append(shape)
    assume(np.prod(shapes[0]) > 0)
    check("Concat", [random(*shape, seed=i) for i, shape in enumerate(shapes)], tolerance=0, axis=axis)


@given(data=st.data(), rank=st.integers(2, 4), batch=st.integers(1, 3))
@QUICK
def test_concat_expands_a_batch_of_one(data: st.DataObject, rank: int, batch: int) -> None:
    """As if the operand had been expanded before, with the gradient of that."""
    sizes = [batch, 3, 2, 4][:rank]
    axis = data.draw(st.integers(1, rank - 1)) - data.draw(st.sampled_from([0, rank]))
    token = torch.from_numpy(random(1, *sizes[1:])).requires_grad_()
    x = torch.from_numpy(random(*sizes, seed=1))
    concat = registry._TABLE["", "Concat", 13]({"axis": axis})
    for order in (slice(None), slice(None, None, -1)):
        actual = concat(*[token, x][order])
        assert torch.equal(actual, torch.cat([token.expand(batch, *sizes[1:]), x][order], axis))
        (gradient,) = torch.autograd.grad(actual.sum(), token)
        assert torch.equal(gradient, torch.full_like(token, batch))


def test_concat_refuses_what_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="2"):
        registry._TABLE["", "Concat", 13]({"axis": 1})(torch.zeros(2, 1), torch.zeros(3, 1))

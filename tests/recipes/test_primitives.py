"""Quantization primitives against an independent numpy reference and against onnxruntime, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from recipes.quantize import primitives as q

Floats = NDArray[np.float32]
checked = settings(max_examples=60, derandomize=True)
reals = st.floats(-100, 100, width=32, allow_subnormal=False)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=8), elements=reals)
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=reals)
scales = st.floats(2**-10, 16, width=32).map(np.float32)
ranges = st.sampled_from([q.signed_range(b) for b in range(2, 9)] + [q.unsigned_range(b) for b in range(2, 9)])


def ref_quantize(x: Floats, scale: Floats, zero: Floats, low: int, high: int) -> Floats:
    return np.clip(np.rint(x / scale) + zero, low, high).astype(np.float32)  # rint rounds half to even


def ref_fake(x: Floats, scale: Floats, zero: Floats, low: int, high: int) -> Floats:
    return ((ref_quantize(x, scale, zero, low, high) - zero) * scale).astype(np.float32)


def ref_parameters(minimum: Floats, maximum: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    minimum, maximum = np.minimum(minimum, np.float32(0)), np.maximum(maximum, np.float32(0))
    scale = (maximum - minimum) / np.float32(high - low)
    scale = np.where(scale > np.finfo(np.float32).tiny * high, scale, np.float32(1))
    return scale, np.clip(low - np.rint(minimum / scale), low, high).astype(np.float32)


def tensor(x: Floats | np.float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float32).copy())


@checked
@given(st.tuples(*[st.integers(1, 8)] * 3), st.integers(1, 6), st.integers(20, 200))
def test_a_sample_sees_every_row_column_and_channel_alike(shape: tuple[int, int, int], count: int, most: int) -> None:
    """With as many images as the stride, every place once; and batches give what all images at once would."""
    size = int(np.prod(shape))
    x = torch.arange(count * size, dtype=torch.float32).view(count, *shape)
    sample = q.spread(x, count, most)
    stride = 1 if len(sample) < 2 else int(sample[1] - sample[0])
    wanted = max(1, x.numel() // most)
    assert wanted <= stride < wanted + 10 or len(sample) == 1
    assert len(sample) == -(-x.numel() // stride) or len(sample) == 1
    many = q.spread(torch.arange(stride * size).view(stride, *shape), stride, stride * size // stride)
    assert sorted((many % size).tolist()) == list(range(size))
    parts = [q.spread(part, count, most, 2 * index) for index, part in enumerate(x.split(2))]
    assert torch.equal(torch.cat(parts), sample)


@checked
@given(arrays, scales, ranges, st.data())
def test_quantize_is_the_reference_to_the_last_bit(
    x: Floats, scale: np.float32, limits: tuple[int, int], data: st.DataObject
) -> None:
    low, high = limits
    zero = np.float32(data.draw(st.integers(low, high)))
    expected = ref_quantize(x, scale, zero, low, high)
    integers = q.quantize(tensor(x), tensor(scale), tensor(zero), low, high)
    np.testing.assert_array_equal(integers.numpy(), expected)
    assert low <= integers.min()
    assert integers.max() <= high
    real = q.dequantize(integers, tensor(scale), tensor(zero)).numpy()
    np.testing.assert_array_equal(real, (expected - zero) * scale)
    np.testing.assert_array_equal(q.fake_quantize(tensor(x), tensor(scale), tensor(zero), low, high).numpy(), real)


@pytest.mark.parametrize(("x", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (3.5, 4)])
def test_halves_go_to_the_even_neighbour(x: float, expected: float) -> None:
    one, zero = torch.ones(()), torch.zeros(())
    assert float(q.quantize(torch.tensor(x), one, zero, -8, 7)) == expected
    assert float(q.round_straight_through(torch.tensor(x))) == expected


@checked
@given(arrays, ranges)
def test_inside_the_range_the_error_is_at_most_half_a_step(x: Floats, limits: tuple[int, int]) -> None:
    scale, zero = q.affine_parameters(tensor(x.min()), tensor(x.max()), *limits)
    error = (q.fake_quantize(tensor(x), scale, zero, *limits) - tensor(x)).abs().max()
    assert float(error) <= float(scale) * 0.5 * (1 + 1e-5) + 1e-6 * float(np.abs(x).max())


@checked
@given(rows, ranges)
def test_affine_parameters_are_the_reference_and_hold_zero(x: Floats, limits: tuple[int, int]) -> None:
    scale, zero = q.affine_parameters(tensor(x.min(1)), tensor(x.max(1)), *limits)
    expected_scale, expected_zero = ref_parameters(x.min(1), x.max(1), *limits)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(zero.numpy(), expected_zero)
    assert bool((scale > 0).all())
    assert limits[0] <= zero.min()
    assert zero.max() <= limits[1]
    assert bool((q.fake_quantize(torch.zeros(len(x)), scale, zero, *limits) == 0).all())


@checked
@given(arrays, scales, ranges)
def test_quantizing_what_is_quantized_changes_nothing(x: Floats, scale: np.float32, limits: tuple[int, int]) -> None:
    zero = torch.tensor(float(sum(limits) // 2))
    once = q.fake_quantize(tensor(x), tensor(scale), zero, *limits)
    torch.testing.assert_close(q.fake_quantize(once, tensor(scale), zero, *limits), once, rtol=0, atol=0)


@checked
@given(rows, ranges, st.sampled_from([1.0, 2.0, 2.4]), st.booleans())
def test_search_is_never_worse_than_the_full_range(
    x: Floats, limits: tuple[int, int], norm: float, symmetric: bool
) -> None:
    def cost(steps: int) -> torch.Tensor:
        scale, zero = q.search_range(tensor(x), *limits, norm=norm, steps=steps, symmetric=symmetric)
        return (q.fake_quantize(tensor(x), scale[:, None], zero[:, None], *limits) - tensor(x)).abs().pow(norm).sum(1)

    assert bool((cost(20) <= cost(1)).all())


@checked
@given(rows, st.sampled_from([(-8, 7), (-2, 1), (0, 15), (0, 3)]), st.booleans(), st.sampled_from([2.0, 2.4]))
def test_search_finds_what_an_exhaustive_search_finds(
    x: Floats, limits: tuple[int, int], symmetric: bool, norm: float
) -> None:
    steps = 12
    scale, zero = q.search_range(tensor(x), *limits, norm=norm, steps=steps, symmetric=symmetric)
    for row, found_scale, found_zero in zip(x, scale.numpy(), zero.numpy(), strict=True):
        minimum, maximum = row.min(), row.max()
        if symmetric:
            maximum = max(maximum, -minimum)
            minimum = -maximum
        costs, grid = [], []
        for step in range(steps):
            shrink = np.float32(1 - step / steps)
            s, z = ref_parameters(minimum * shrink, maximum * shrink, *limits)
            z = np.float32((sum(limits) + 1) // 2) if symmetric else z
            grid.append((float(s), float(z)))
            costs.append(float((np.abs(ref_fake(row, s, z, *limits).astype(np.float64) - row) ** norm).sum()))
        found = ref_fake(row, found_scale, found_zero, *limits).astype(np.float64)
        assert (float(found_scale), float(found_zero)) in grid
        assert (np.abs(found - row) ** norm).sum() <= min(costs) * (1 + 1e-4) + 1e-12


def test_search_shrinks_the_range_for_outliers() -> None:
    row = torch.cat([torch.linspace(-1, 1, 20_000), torch.tensor([-4.0, 4.0])])[None]
    scale, _ = q.search_range(row, -8, 7, norm=2.0)
    full, _ = q.search_range(row, -8, 7, norm=2.0, steps=1)
    assert float(scale) < 0.5 * float(full)


@pytest.mark.parametrize("at_once", [1, 8, 30, 1 << 30])
def test_ranges_do_not_depend_on_how_many_are_tried_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).t()  # as a Gemm's weight [I, O] has them
    expected = q.search_range(rows, -8, 7)
    monkeypatch.setitem(q.AT_ONCE, "cpu", at_once)
    for found, same in zip(q.search_range(rows, -8, 7), expected, strict=True):
        torch.testing.assert_close(found, same, rtol=0, atol=0)


@pytest.mark.parametrize("limits", [(-8, 7), (0, 15), (-2, 1), (0, 255)])
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75])
def test_constant_rows_survive(limits: tuple[int, int], value: float) -> None:
    row = torch.full((2, 9), value)
    scale, zero = q.search_range(row, *limits)
    assert bool(torch.isfinite(scale).all() and (scale > 0).all())
    torch.testing.assert_close(q.fake_quantize(row, scale[:, None], zero[:, None], *limits), row, rtol=1e-6, atol=0)


def test_an_all_zero_row_does_not_disturb_its_neighbour() -> None:
    row = torch.linspace(-1, 1, 8)
    scale, zero = q.search_range(torch.stack([torch.zeros(8), row]), -8, 7)
    alone_scale, alone_zero = q.search_range(row[None], -8, 7)
    assert float(scale[0]) == 1
    assert (float(scale[1]), float(zero[1])) == (float(alone_scale), float(alone_zero))


@checked
@given(rows)
def test_symmetric_search_of_a_signed_range_puts_zero_in_the_middle(x: Floats) -> None:
    _, signed = q.search_range(tensor(x), -8, 7, symmetric=True)
    _, unsigned = q.search_range(tensor(x), 0, 15, symmetric=True)
    assert bool((signed == 0).all())
    assert bool((unsigned == 8).all())


@checked
@given(hnp.arrays(np.float64, 7, elements=st.floats(0, 1)))
def test_inverse_rectified_sigmoid_is_the_inverse(h: NDArray[np.float64]) -> None:
    expected = torch.from_numpy(h.copy())
    torch.testing.assert_close(q.rectified_sigmoid(q.inverse_rectified_sigmoid(expected)), expected, rtol=0, atol=1e-9)


@checked
@given(hnp.arrays(np.float32, 7, elements=st.floats(-50, 50, width=32)))
def test_rectified_sigmoid_is_the_formula_within_0_and_1(v: Floats) -> None:
    h = q.rectified_sigmoid(tensor(v)).numpy()
    assert h.min() >= 0
    assert h.max() <= 1
    np.testing.assert_allclose(h, np.clip(1.2 / (1 + np.exp(-v.astype(np.float64))) - 0.1, 0, 1), atol=1e-6)


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_regulariser_is_zero_at_the_ends_and_one_in_the_middle(beta: float) -> None:
    assert float(q.rounding_regulariser(torch.tensor([0.0, 1.0, 1.0]), beta)) == 0
    assert float(q.rounding_regulariser(torch.full((3,), 0.5), beta)) == 1
    h = torch.linspace(0, 1, 11)
    assert float(q.rounding_regulariser(h, beta)) == pytest.approx(np.mean(1 - np.abs(2 * h.numpy() - 1) ** beta))


def test_straight_through_rounding_has_gradient_one() -> None:
    x = torch.tensor([-1.7, -0.5, 0.2, 0.5, 3.0], requires_grad=True)
    q.round_straight_through(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 5


def onnx_quantize(x: Floats, scale: np.float32, zero: int, kind: int) -> tuple[NDArray[np.generic], Floats]:
    """QuantizeLinear and DequantizeLinear of onnxruntime."""
    parameters = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [float(scale)]),
        helper.make_tensor("zero", kind, [], [zero]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor_value_info("q", kind, [None]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [None]),
        ],
        parameters,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    integers, real = session.run(None, {"x": x})
    return integers, real


@settings(checked, max_examples=25)
@given(st.data(), st.booleans())
def test_onnxruntime_computes_the_same(data: st.DataObject, signed: bool) -> None:
    low, high = q.signed_range(8) if signed else q.unsigned_range(8)
    scale = np.float32(data.draw(st.sampled_from([0.5, 0.25, 0.1, 0.037, 1.3])))
    zero = data.draw(st.integers(low, high))
    halves = (np.arange(low - 3, high + 3) + np.float32(0.5)) * scale  # ties, and beyond both ends
    drawn = data.draw(hnp.arrays(np.float32, 20, elements=reals))
    x = np.concatenate([halves, drawn]).astype(np.float32)
    integers, real = onnx_quantize(x, scale, zero, TensorProto.INT8 if signed else TensorProto.UINT8)
    ours = q.quantize(tensor(x), tensor(scale), torch.tensor(float(zero)), low, high)
    np.testing.assert_array_equal(ours.numpy(), integers.astype(np.float32))
    np.testing.assert_array_equal(q.dequantize(ours, tensor(scale), torch.tensor(float(zero))).numpy(), real)


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, floating: Tensor | None) -> Tensor:
    """The definition of `fake_quantize_learned`, by autograd: exact rounding with the gradient of the identity."""
    position = torch.clamp(x / scale, low - zero, high - zero)
    quantized = (position - position.detach() + torch.round(position).detach()) * scale
    return quantized if floating is None else torch.where(floating == 1, x, quantized)


@pytest.mark.parametrize("drop", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0, 15), (-8, 7), (0, 255)])
def test_learned_fake_quantization_has_the_gradients_of_its_definition(drop: float | None, low: int, high: int) -> None:
    """Values inside the range and on both sides of it."""
    lot = torch.Generator().manual_seed(low + high)
    x = (torch.randn(4, 50, 10, generator=lot) * 0.1 * (high - low)).double()
    zero, scale = torch.tensor(float(max(low, 3))), torch.tensor(0.25).double()
    floating = None if drop is None else (torch.rand(x.shape, generator=lot) < drop).double()
    weights = torch.randn(x.shape, generator=lot).double()
    found = []
    for function in (q.fake_quantize_learned, straight_through):
        tensors = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(*tensors, zero, low, high, floating)
        (out * weights).sum().backward()
        found.append((out.detach(), tensors[0].grad, tensors[1].grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(q.fake_quantize_learned(x, scale, zero, low, high, floating), found[0][0])


def test_learned_fake_quantization_with_a_fixed_scale() -> None:
    x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    q.fake_quantize_learned(x, torch.tensor(0.5), torch.tensor(4.0), 0, 15).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]


@checked
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    st.integers(0, 1),
    st.integers(0, 7),
)
def test_each_weight_gets_the_scale_of_its_row(shape: tuple[int, ...], axis: int, size: int) -> None:
    """Rows are channels, or `size` neighbours along the inputs at one place of the kernel; short ones end in zeros."""
    granularity = q.Granularity(shape, axis, size)
    weight = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    rows = granularity.rows(weight)
    number = granularity.expand(granularity.arrange(torch.arange(len(rows)))).expand(shape)
    assert granularity.arrange(torch.arange(len(rows))).shape == granularity.scales
    for index, row in enumerate(rows):
        assert sorted(row[row > 0].tolist()) == sorted(weight[number == index].tolist())
    if size:
        places = torch.arange(shape[1 - axis]) // size
        expected = places.view([-1 if dim == 1 - axis else 1 for dim in range(len(shape))]).expand(shape)
        others = torch.arange(math.prod(shape) // shape[1 - axis]).view(
            [1 if dim == 1 - axis else length for dim, length in enumerate(shape)]
        )
        assert torch.equal(number, others * (1 + int(places.max())) + expected)

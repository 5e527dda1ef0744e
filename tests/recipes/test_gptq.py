"""Rounding that makes up for its own error: its equations on small problems, and its worth on a real layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from converters.conversion import to_torch
from converters.load import load_classifier
from recipes import zoo
from recipes.least_squares import DAMPING, moments
from recipes.quantize import primitives as q
from recipes.quantize.gptq import gptq


def problem(groups: int, rows: int, size: int, count: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated operands on both streams, [G, n, K], and weights [G, R, K]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    clean = torch.rand(groups, count, size, generator=generator, dtype=torch.float64) @ mixing
    noisy = clean + 0.02 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean, noisy, torch.randn(groups, rows, size, generator=generator, dtype=torch.float64)


def test_without_rounding_it_is_least_squares() -> None:
    """At 30 bits nothing is lost to rounding: what is left is the ridge regression, held against its own equation."""
    clean, noisy, rows = problem(2, 3, 5)
    found = moments([(clean, noisy)])
    scale, zero = torch.full((2, 3, 1), 1e-6, dtype=torch.float64), torch.zeros(2, 3, 1, dtype=torch.float64)
    chosen, _ = gptq(rows, found, scale, zero, -(2**29), 2**29 - 1)
    damping = (
        (DAMPING + 5 / 400)
        * found.own.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        * torch.eye(5, dtype=torch.float64)
    )
    residual = chosen @ (found.own + damping) - rows @ (found.cross + damping)
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_answers_better_than_nearest_rounding(bits: int) -> None:
    clean, noisy, rows = problem(3, 8, 12)
    low, high = q.signed_range(bits)
    scale, zero = (value.view(3, 8, 1) for value in q.search_range(rows.reshape(24, 12), low, high))
    chosen, shift = gptq(rows, moments([(clean, noisy)]), scale, zero, low, high)
    target = clean @ rows.mT

    def error(weights: Tensor, bias: Tensor | float = 0.0) -> float:
        rounded = q.fake_quantize(weights, scale, zero, low, high)
        return float((noisy @ rounded.mT + bias - target).square().mean())

    assert error(chosen, shift[:, None, :]) < 0.5 * error(rows)
    assert error(chosen, shift[:, None, :]) <= error(chosen) + 1e-9  # the bias takes the mean that is left


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_stay_and_others_make_up_for_that(bits: int) -> None:
    clean, noisy, rows = problem(3, 8, 12)
    zeros = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    rows = torch.where(zeros, 0.0, rows)
    low, high = q.signed_range(bits)
    scale, zero = (value.view(3, 8, 1) for value in q.search_range(rows.reshape(24, 12), low, high))
    target = clean @ rows.mT

    def error(known: Tensor | None) -> float:
        chosen, shift = gptq(rows, moments([(clean, noisy)]), scale, zero, low, high, known)
        rounded = q.fake_quantize(chosen, scale, zero, low, high)
        answer = noisy @ torch.where(zeros, 0.0, rounded).mT + shift[:, None, :]
        return float((answer - target).square().mean())

    assert error(zeros) < 0.9 * error(None)


@pytest.mark.parametrize("family", ["inverted", "plain"])
def test_operand_vectors_times_weights_are_the_layer(family: str) -> None:
    """Conv with and without groups, strides and padding, and Gemm: the product gives back the layer's output."""
    module = to_torch(load_classifier(zoo.model_path(family)))
    generator = torch.Generator().manual_seed(0)
    x = module.spec.to_input(torch.rand(2, 1, 28, 28, generator=generator))
    for layer in module.layers():
        values = module.segment([module.input_name], [layer.input, layer.output])({module.input_name: x})
        vectors = module.operand_vectors(layer, values[layer.input], 10**6)
        weight = module.constant(layer.weight).movedim(layer.axis, 0)
        rows = weight.reshape(layer.groups, len(weight) // layer.groups, -1)
        product = (vectors @ rows.mT).permute(1, 0, 2).reshape(len(x), -1, len(weight))
        bias = module.constant(layer.bias) if layer.bias else 0.0
        expected = values[layer.output].reshape(len(x), len(weight), -1).mT
        torch.testing.assert_close(product + bias, expected, rtol=1e-4, atol=1e-4)

"""Statistics on the way through: equal to torch's own, gradients by finite differences, in any layout and type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from converters.torch_module import TorchClassifier
from recipes.synth.statistics import Observer, norms_by_layer, spread, sums_by_layer
from tests.recipes.observing import observe

SHAPES = [(4, 3, 5, 6), (6, 7), (3, 2, 8), (2, 3, 2, 3, 4)]


def plainly(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased deviation, written out."""
    rows = x.movedim(1, 0).flatten(1)
    mean = rows.mean(1)
    return mean, ((rows - mean[:, None]).square().mean(1) + 1e-12).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_those_of_the_elements(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = (3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    y, (mean, deviation) = observe(x)
    assert torch.equal(y, x)
    expected = plainly(x.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mean.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(deviation.double(), expected[1], rtol=tolerance, atol=tolerance)
    assert mean.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_far_from_zero_the_deviation_keeps_its_digits(generator: torch.Generator) -> None:
    """E[x^2] - m^2 in float32 would lose all of it."""
    x = 1000 + 0.01 * torch.randn(64, 2, 8, 8, generator=generator)
    deviation = observe(x)[1][1]
    torch.testing.assert_close(deviation.double(), plainly(x.double())[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_does_not_matter(layout: torch.memory_format, generator: torch.Generator) -> None:
    x = torch.randn(5, 6, 7, 8, generator=generator)
    expected, actual = observe(x)[1], observe(x.contiguous(memory_format=layout))[1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_finite_differences(shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Of all three results, and of them together with what goes on through x."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def together(x: Tensor) -> Tensor:
        y, (mean, deviation) = observe(x)
        return (y.sin() * x.cos()).sum() + (mean * deviation.log()).sum() * 3

    assert torch.autograd.gradcheck(lambda x: (observe(x)[0], *observe(x)[1]), (x,))
    assert torch.autograd.gradcheck(together, (x,))


def test_a_result_that_nobody_uses_has_no_say(generator: torch.Generator) -> None:
    x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    (of_mean,) = torch.autograd.grad(observe(x)[1][0].sum(), x)
    torch.testing.assert_close(of_mean, torch.full_like(x, 1 / 20))
    (of_value,) = torch.autograd.grad(observe(x)[0].square().sum(), x)
    torch.testing.assert_close(of_value, 2 * x.detach())


@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 4, 5, 3)])
def test_channels_may_come_last(shape: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    y, statistics = observe(x, -1)
    assert torch.equal(y, x)
    torch.testing.assert_close(statistics, plainly(x.movedim(-1, 1)))
    assert torch.autograd.gradcheck(lambda x: (observe(x, -1)[0], *observe(x, -1)[1]), (x,))


def test_a_constant_channel_has_a_finite_gradient() -> None:
    x = torch.full((4, 2, 3, 3), 0.7, requires_grad=True)
    (gradient,) = torch.autograd.grad(observe(x)[1][1].sum(), x)
    assert bool(torch.isfinite(gradient).all())


def test_an_observer_sees_what_a_tap_reads(
    module_of: Callable[[str], TorchClassifier], generator: torch.Generator
) -> None:
    """And the logits, and their gradient, are those of the model left alone."""
    module = module_of("excite")
    names = [norm.input for norm in module.batchnorms()]
    pixels = torch.rand(4, 1, 28, 28, generator=generator, requires_grad=True)
    x = module.spec.to_input(pixels)
    tapped = module.segment([module.input_name], names)({module.input_name: x})
    observer = Observer(dict.fromkeys(names, 1))
    segment = module.segment([module.input_name], [module.logits_name])
    logits = segment({module.input_name: x}, transforms=observer.transforms)[module.logits_name]
    torch.testing.assert_close(logits, module(x))
    assert list(observer.statistics) == names
    for name in names:
        torch.testing.assert_close(observer.statistics[name], plainly(tapped[name]), rtol=1e-4, atol=1e-5)
    (actual,) = torch.autograd.grad(logits.square().sum(), pixels, retain_graph=True)
    (expected,) = torch.autograd.grad(module(x).square().sum(), pixels)
    torch.testing.assert_close(actual, expected)


COUNTS = (3, 1, 4)


@pytest.mark.parametrize(
    ("together", "alone"),
    [(norms_by_layer, torch.linalg.vector_norm), (sums_by_layer, torch.sum)],
)
def test_what_is_done_for_all_layers_at_once_is_done_for_each(
    together: Callable[[Tensor, tuple[int, ...]], Tensor],
    alone: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> None:
    x = torch.randn(sum(COUNTS), generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(together(x, COUNTS), torch.stack([alone(part) for part in x.split(COUNTS)]))
    assert torch.autograd.gradcheck(lambda x: together(x, COUNTS), (x,))


def test_numbers_of_layers_are_spread_over_their_channels(generator: torch.Generator) -> None:
    x = torch.randn(len(COUNTS), generator=generator, dtype=torch.float64, requires_grad=True)
    assert spread(x, COUNTS).tolist() == [x[0].item()] * 3 + [x[1].item()] + [x[2].item()] * 4
    assert torch.autograd.gradcheck(lambda x: spread(x, COUNTS), (x,))


def test_a_norm_of_zero_has_no_slope() -> None:
    x = torch.tensor([0.0, 0.0, 3.0, 4.0], requires_grad=True)
    norms_by_layer(x, (2, 2)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 0.6, 0.8]))


def test_layers_that_are_seen_together_have_the_statistics_and_gradients_of_each(generator: torch.Generator) -> None:
    """The second one reads the first, and neither has the channels or the elements of the other."""
    x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    def losses(observed: Callable[[str, Tensor], tuple[Tensor, tuple[Tensor, Tensor]]], x: Tensor) -> Tensor:
        y, _ = observed("first", x)
        z, _ = observed("second", y[:, :2, 1:].tanh())
        return z.square().sum()

    def together(x: Tensor) -> Tensor:
        observer = Observer({"first": 1, "second": 1})
        through = losses(lambda name, x: (observer.transforms[name](x), (x, x)), x)
        return through + sum(((m * d.log()).sum() for m, d in observer.statistics.values()), through.new_zeros(()))

    def each(x: Tensor) -> Tensor:
        seen = []

        def observed(_name: str, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            seen.append(plainly(x))
            return x, seen[-1]

        through = losses(observed, x)
        return through + sum(((m * d.log()).sum() for m, d in seen), through.new_zeros(()))

    torch.testing.assert_close(together(x), each(x))
    (actual,), (expected,) = (torch.autograd.grad(loss(x), x) for loss in (together, each))
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(together, (x,))

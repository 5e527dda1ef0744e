"""Loss terms against numpy and finite differences; learned weights against their closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from converters.torch_module import BatchNorm, TorchClassifier
from recipes.synth.mixing import draw_mix, mixed_cross_entropy
from recipes.synth.objectives import (
    LearnedWeights,
    batchnorm_loss,
    deep_inversion_prior,
    total_variation,
    unevenness_loss,
)
from recipes.synth.statistics import Observer
from tests.recipes.observing import observe


def statistics(x: Tensor, name: str = "x", correction: int = 0) -> BatchNorm:
    """A BatchNorm that stored exactly what `x` has."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return BatchNorm(name, f"{name}.out", x.mean(axes), x.var(axes, correction=correction))


def random_norm(channels: int, generator: torch.Generator, name: str = "x") -> BatchNorm:
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    variance = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.1
    return BatchNorm(name, f"{name}.out", mean, variance)


def loss_of(values: Mapping[str, Tensor], norms: list[BatchNorm], *, relative: bool = False) -> Tensor:
    return batchnorm_loss({name: observe(x)[1] for name, x in values.items()}, norms, relative=relative)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (16, 7)])
def test_batchnorm_loss_is_zero_when_statistics_match(shape: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    assert float(loss_of({"x": x}, [statistics(x)])) < 1e-9
    assert float(loss_of({"x": x + 0.1}, [statistics(x)])) == pytest.approx(0.1 * shape[1] ** 0.5)
    assert float(loss_of({"x": x}, [statistics(x, correction=1)])) > 1e-3  # the deviation is the biased one


def test_batchnorm_loss_is_the_formula_in_numpy(generator: torch.Generator) -> None:
    values = {
        "a": 3 * torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64) + 1,
        "b": torch.randn(4, 8, generator=generator, dtype=torch.float64),
    }
    norms = [random_norm(3, generator, "a"), random_norm(8, generator, "b")]
    expected = 0.0
    for norm in norms:
        x = np.moveaxis(values[norm.input].numpy(), 1, 0).reshape(len(norm.mean), -1)
        expected += np.sqrt(((x.mean(1) - norm.mean.numpy()) ** 2).sum())
        expected += np.sqrt(((x.std(1) - np.sqrt(norm.variance.numpy())) ** 2).sum())
    assert float(loss_of(values, norms)) == pytest.approx(expected, rel=1e-9)


def test_batchnorm_loss_passes_gradcheck(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    norms = [random_norm(2, generator)]
    assert torch.autograd.gradcheck(lambda x: loss_of({"x": x}, norms), (x,))


@pytest.mark.parametrize("case", ["matching", "constant"])
def test_batchnorm_loss_has_a_finite_gradient_where_roots_have_none(case: str, generator: torch.Generator) -> None:
    x = torch.randn(4, 3, 5, 5, generator=generator)
    norm = statistics(x)
    x = (x if case == "matching" else torch.full_like(x, 0.3)).requires_grad_(True)
    loss_of({"x": x}, [norm]).backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def unevenness(*values: Tensor) -> Tensor:
    """`unevenness_loss` of some layers' outputs."""
    seen = {str(number): observe(x)[1] for number, x in enumerate(values)}
    return unevenness_loss(seen, seen)


def test_unevenness_loss_is_the_formula_in_numpy(generator: torch.Generator) -> None:
    sizes = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64).view(3, 1, 1)
    a = sizes * torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64) + 1
    b = torch.randn(4, 8, 7, generator=generator, dtype=torch.float64)
    expected = []
    for x in (a, b):
        channels = np.moveaxis(x.numpy(), 1, 0).reshape(x.shape[1], -1)
        size = np.exp(np.log(channels.std(1)).mean())
        expected.append(np.mean((channels.mean(1) / size) ** 2) + np.mean(np.log(channels.std(1) / size) ** 2))
    assert float(unevenness(a, b)) == pytest.approx(np.mean(expected), rel=1e-6)


@given(size=st.floats(1e-2, 1e3))
def test_unevenness_loss_is_zero_for_even_channels_of_any_size(size: float) -> None:
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    even = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    assert float(unevenness(size * even)) == pytest.approx(0, abs=1e-9)
    assert float(unevenness(size * x)) == pytest.approx(float(unevenness(x)), rel=1e-6)
    assert float(unevenness(size * (even + 0.5))) == pytest.approx(0.25)


def test_unevenness_loss_leaves_dead_channels_out(generator: torch.Generator) -> None:
    """Those that BatchNorm scaled to nothing, and those whose input has died."""
    x = torch.randn(4, 3, 5, 6, generator=generator)
    with_dead = torch.cat([x, torch.full((4, 2, 5, 6), 0.3)], 1).requires_grad_(True)
    loss = unevenness(with_dead)
    assert float(loss) == pytest.approx(float(unevenness(x)))
    loss.backward()
    assert with_dead.grad is not None
    assert bool((with_dead.grad[:, 3:] == 0).all())


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 1, 1)])
def test_unevenness_loss_asks_nothing_of_a_constant_layer(shape: tuple[int, ...], value: float) -> None:
    """As a single image has where its map is of one place."""
    x = torch.full(shape, value).requires_grad_(True)
    loss = unevenness(x)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-9)
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6


def test_unevenness_loss_passes_gradcheck(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unevenness, (x,))


def test_total_variation_of_a_constant_is_zero() -> None:
    assert float(total_variation(torch.full((2, 3, 5, 7), 0.4))) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
def test_total_variation_counts_no_neighbour_that_is_not_there(size: tuple[int, int]) -> None:
    images = torch.arange(8.0).repeat_interleave(4).view(8, 1, -1)[:, :, : size[0] * size[1]].reshape(8, 1, *size)
    assert float(total_variation(images)) == 0


def test_a_dead_layer_does_not_drown_the_others(generator: torch.Generator) -> None:
    """Its deviations are 0, so that its error is relative to nothing."""
    dead = BatchNorm("dead", "dead.out", torch.zeros(3), torch.zeros(3))
    live = random_norm(3, generator, "live")
    off = torch.full((3,), 1e-3)
    found = {"dead": (off, off), "live": (live.mean + 1, live.variance.sqrt())}
    loss = float(batchnorm_loss(found, [dead, live], relative=True))
    alone = float(batchnorm_loss(found, [live], relative=True))
    assert loss == pytest.approx(alone, abs=0.01)


def test_total_variation_is_the_formula_in_numpy(generator: torch.Generator) -> None:
    images = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    x = images.numpy()
    expected = ((x[:, :, 1:] - x[:, :, :-1]) ** 2).mean() + ((x[:, :, :, 1:] - x[:, :, :, :-1]) ** 2).mean()
    assert float(total_variation(images)) == pytest.approx(expected)


def test_deep_inversion_prior_by_hand() -> None:
    """Two rows, two columns: differences 1 and 3 along rows, 2 and 4 along columns, 5 and -1 on the diagonals."""
    images = torch.tensor([[0.0, 1.0], [2.0, 5.0]]).expand(1, 1, 2, 2)
    roughness = np.sqrt(1 + 9) + np.sqrt(4 + 16) + 5 + 1
    assert float(deep_inversion_prior(images, 1, 0)) == pytest.approx(roughness)
    assert float(deep_inversion_prior(images, 0, 1)) == pytest.approx(np.sqrt(30))
    assert float(deep_inversion_prior(images.repeat(4, 1, 1, 1), 1, 0)) == pytest.approx(2 * roughness)


def test_total_variation_passes_gradcheck(generator: torch.Generator) -> None:
    images = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, (images,))


def test_learned_weights_find_their_closed_form() -> None:
    first = {"a": 2.0, "b": 0.5, "c": 30.0}
    now = {"a": 0.5, "b": 0.02, "c": 45.0}
    weights = LearnedWeights()
    for name, value in first.items():
        weights.register(name, value, torch.device("cpu"))
    terms = {name: torch.tensor(value) for name, value in now.items()}
    assert float(weights.combine(terms, {})) == pytest.approx(sum(now[n] / first[n] + 1 for n in now), rel=1e-6)
    optimizer = torch.optim.Adam(weights.alpha.values(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        weights.combine(terms, {}).backward()
        optimizer.step()
    roots = {name: (now[name] / first[name]) ** 0.5 for name in now}
    for name, root in roots.items():
        assert float(weights.alpha[name].detach() ** 2) == pytest.approx(root, rel=1e-3)
    assert float(weights.combine(terms, {})) == pytest.approx(2 * sum(roots.values()), rel=1e-5)


def test_factors_weigh_the_terms() -> None:
    weights = LearnedWeights()
    for name in ("a", "b"):
        weights.register(name, 4.0, torch.device("cpu"))
    terms = {"a": torch.tensor(4.0), "b": torch.tensor(8.0)}
    assert float(weights.combine(terms, {"a": 0.0})) == pytest.approx(2 + 1)
    assert float(weights.combine(terms, {"a": 3.0, "b": 0.5})) == pytest.approx(3 * 2 + 0.5 * 3)
    assert float(weights.combine({"b": terms["b"]}, {})) == pytest.approx(3)


def test_a_term_that_starts_at_zero_is_not_divided_by_zero() -> None:
    weights = LearnedWeights()
    weights.register("a", 0.0, torch.device("cpu"))
    assert float(weights.combine({"a": torch.tensor(0.25)}, {})) == pytest.approx(1.25)


def descend(
    loss: Callable[[Tensor], Tensor], pixels: Tensor, steps: int = 5, rate: float = 0.02
) -> tuple[float, float]:
    """The loss before and after a few steps, each of `rate` root mean square along the gradient."""
    before = float(loss(pixels))
    for _ in range(steps):
        pixels = pixels.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(pixels), pixels)
        pixels = pixels.detach() - rate * gradient / gradient.square().mean().sqrt()
    return before, float(loss(pixels.detach()))


@pytest.mark.parametrize("name", ["inverted", "plain", "residual"])
def test_five_steps_lower_the_batchnorm_loss(
    name: str, module_of: Callable[[str], TorchClassifier], generator: torch.Generator
) -> None:
    module = module_of(name)
    norms = module.batchnorms()
    segment = module.segment([module.input_name], [module.logits_name])

    def loss(pixels: Tensor) -> Tensor:
        observer = Observer({norm.input: 1 for norm in norms})
        segment({module.input_name: module.spec.to_input(pixels)}, transforms=observer.transforms)
        return batchnorm_loss(observer.statistics, norms)

    before, after = descend(loss, torch.rand(8, 1, 28, 28, generator=generator))
    assert after < 0.9 * before


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["inverted", "residual"])
def test_five_steps_lower_the_label_loss(
    name: str, mixed: bool, module_of: Callable[[str], TorchClassifier], generator: torch.Generator
) -> None:
    module = module_of(name)
    labels = torch.arange(8)
    mix = draw_mix(8, (28, 28), (0.3, 0.5), generator)

    def loss(pixels: Tensor) -> Tensor:
        logits = module(module.spec.to_input(mix.apply(pixels) if mixed else pixels))
        return mixed_cross_entropy(logits, labels, mix) if mixed else F.cross_entropy(logits, labels)

    before, after = descend(loss, torch.rand(8, 1, 28, 28, generator=generator))
    assert after < 0.9 * before

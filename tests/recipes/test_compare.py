"""The two-sample test: right against loops, of the level it claims, with power; and statistics of the whole set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.input_spec import SpecError
from converters.torch_module import TorchClassifier
from recipes import zoo
from recipes.compare import compare, kernel_matrix, two_sample_test, unbiased_mmd2
from recipes.images import ImageSet, gaussian_noise, load_images
from tests import models

Modules = Callable[[str], TorchClassifier]


def samples(count: int, seed: int, shift: float = 0.0, spread: float = 1.0, dimension: int = 3) -> Tensor:
    return shift + spread * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def by_loops(a: Tensor, b: Tensor) -> float:
    """Gretton et al. 2012, equation 3, term by term."""
    pooled = torch.cat([a, b]).double()
    pairs = [float((pooled[i] - pooled[j]).norm()) for i in range(len(pooled)) for j in range(i + 1, len(pooled))]
    width = sorted(pairs)[(len(pairs) - 1) // 2]

    def k(x: Tensor, y: Tensor) -> float:
        return math.exp(-float((x.double() - y.double()).square().sum()) / (2 * width**2))

    m, n = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_b = sum(k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (m * n)


@settings(max_examples=25)
@given(m=st.integers(2, 6), n=st.integers(2, 6), seed=st.integers(0, 1000))
def test_the_estimate_is_that_of_the_formula(m: int, n: int, seed: int) -> None:
    a, b = samples(m, seed), samples(n, seed + 1, shift=0.5)
    kernel = kernel_matrix(torch.cat([a, b]))
    assert float(unbiased_mmd2(kernel, torch.arange(m + n) < m)) == pytest.approx(by_loops(a, b), abs=1e-6)


def test_many_divisions_at_once_are_each_of_them_alone() -> None:
    kernel = kernel_matrix(samples(9, 0))
    divisions = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s)) < 4 for s in range(5)])
    together = unbiased_mmd2(kernel, divisions)
    assert together.tolist() == pytest.approx([float(unbiased_mmd2(kernel, one)) for one in divisions])


def test_the_test_has_the_level_it_claims() -> None:
    """Samples of one distribution: p <= 0.1 in about a tenth of 200 pairs (20 +- 4.2), and a mean MMD^2 of 0."""
    results = [two_sample_test(samples(20, 2 * s), samples(20, 2 * s + 1), 99, s) for s in range(200)]
    assert 8 <= sum(p <= 0.1 for _, p in results) <= 33
    values = torch.tensor([value for value, _ in results])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(200)


@pytest.mark.parametrize(("shift", "spread"), [(0.8, 1.0), (0.0, 2.0)])
def test_the_test_has_power_against_place_and_spread(shift: float, spread: float) -> None:
    """Equal means are no excuse: a universal kernel sees every difference."""
    for seed in range(20):
        value, p = two_sample_test(samples(60, seed), samples(60, seed + 100, shift, spread), 199, seed)
        assert p <= 0.05
        assert value > 0


def test_equal_sets_and_the_least_p_value() -> None:
    a = samples(12, 0)
    value, p = two_sample_test(a, a.clone(), 99, 0)
    assert value <= 0  # unbiased: the diagonal is left out, while the pairs across hold each point beside itself
    assert p > 0.5
    assert two_sample_test(a, a + 100, 99, 0)[1] == pytest.approx(1 / 100)


def test_identical_points_do_not_divide_by_zero() -> None:
    value, p = two_sample_test(torch.ones(5, 2), torch.ones(4, 2), 19, 0)
    assert value == pytest.approx(0)
    assert p == 1


def test_real_images_are_told_from_noise_and_not_from_real_ones(module_of: Modules) -> None:
    real = load_images(zoo.calibration_images_path())
    halves = [ImageSet(real.pixels[start::2], source="half") for start in (0, 1)]
    noise = gaussian_noise(128, 1, (28, 28), 0)
    for name in ("inverted", "plain"):
        alike = compare(module_of(name), *halves, permutations=99)
        unlike = compare(module_of(name), halves[0], noise, permutations=99)
        assert alike.p_value > 0.05
        assert unlike.p_value == pytest.approx(0.01)
        assert unlike.mmd2 > 0.1 > 0.02 > alike.mmd2
        assert unlike.distance > 3 * alike.distance
        assert alike.to_stored is not None
        assert unlike.to_stored is not None
        assert alike.to_stored[0] == pytest.approx(unlike.to_stored[0])
        assert unlike.to_stored[1] > 3 * unlike.to_stored[0]


def test_statistics_are_those_of_the_whole_set_however_it_is_cut(module_of: Modules) -> None:
    """100 images are two unequal parts inside; the distance must be that of one forward pass over all."""
    module, images = module_of("plain"), gaussian_noise(100, 1, (28, 28), 1)
    norm = module.batchnorms()[2]
    x = module.segment([module.input_name], [norm.input])({module.input_name: module.spec.to_input(images.pixels)})
    found = x[norm.input].double()
    mean, std = found.mean((0, 2, 3)), found.var((0, 2, 3), correction=0).sqrt()
    real = load_images(zoo.calibration_images_path(), 64)
    y = module.segment([module.input_name], [norm.input])({module.input_name: module.spec.to_input(real.pixels)})
    other = y[norm.input].double()
    mean_b, std_b = other.mean((0, 2, 3)), other.var((0, 2, 3), correction=0).sqrt()
    expected = float(((mean - mean_b).norm() + (std - std_b).norm()) / std_b.norm())
    assert dict(compare(module, images, real, permutations=9).layers)[norm.input] == pytest.approx(expected, rel=1e-5)


def test_a_model_without_statistics_is_compared_by_its_layers(module_of: Modules) -> None:
    module = module_of("inverted_folded")
    result = compare(module, gaussian_noise(8, 1, (28, 28), 0), gaussian_noise(8, 1, (28, 28), 1), permutations=9)
    assert result.to_stored is None
    assert [name for name, _ in result.layers] == list(dict.fromkeys(layer.output for layer in module.layers()))


def test_channels_behind_a_matmul_are_the_last_axis(load: Callable[..., Classifier]) -> None:
    """Tokens are no channels: two sets that differ in the order of tokens alone have equal statistics."""
    module = to_torch(load(models.tokens()))
    size = module.spec.size
    a = gaussian_noise(8, module.spec.channel_count, size, 0)
    b = replace(a, pixels=a.pixels.flip(2))
    result = compare(module, a, b, permutations=9)
    assert result.layers[0][1] == pytest.approx(0, abs=1e-5)


def test_a_set_of_one_image_has_the_size_of_its_values(load: Callable[..., Classifier]) -> None:
    """Deviations of zero are nothing to be relative to: the distance was 1e12."""
    module = to_torch(load(models.gemm(trans_b=1)))
    a = gaussian_noise(8, module.spec.channel_count, module.spec.size, 0)
    b = replace(a, pixels=a.pixels[:1].repeat(8, 1, 1, 1))
    found = module(module.spec.to_input(a.pixels)).detach().double()
    (_, distance), *_ = compare(module, a, b, permutations=9).layers
    expected = ((found.mean(0) - found[0]).norm() + found.std(0, correction=0).norm()) / found[0].norm()
    assert distance == pytest.approx(float(expected), rel=1e-5)


def test_too_few_images_and_wrong_channels_are_refused(module_of: Modules) -> None:
    module, enough = module_of("plain"), gaussian_noise(8, 1, (28, 28), 0)
    with pytest.raises(MixMixError, match="at least 4"):
        compare(module, enough, gaussian_noise(3, 1, (28, 28), 0))
    with pytest.raises(SpecError, match="channels"):
        compare(module, gaussian_noise(8, 2, (28, 28), 0), enough)


def test_features_that_are_no_numbers_are_refused(module_of: Modules) -> None:
    """NaN compares as unlike everything: a test would call it the surest of differences."""
    images = gaussian_noise(8, 1, (28, 28), 0)
    broken = replace(images, pixels=torch.full_like(images.pixels, torch.nan))
    with pytest.raises(MixMixError, match="NaN"):
        compare(module_of("plain"), images, broken)


def test_large_sets_are_tested_on_some_of_their_images(module_of: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.compare.LARGEST", 10)
    a, b = gaussian_noise(35, 1, (28, 28), 0), gaussian_noise(10, 1, (28, 28), 1)
    some = replace(a, pixels=a.pixels[::4])
    module = module_of("plain")
    assert compare(module, a, b, permutations=9).mmd2 == pytest.approx(compare(module, some, b, permutations=9).mmd2)


def test_the_seed_decides_the_p_value(module_of: Modules) -> None:
    a, b = gaussian_noise(10, 1, (28, 28), 0), gaussian_noise(10, 1, (28, 28), 1)
    first, again = (compare(module_of("plain"), a, b, permutations=50, seed=3) for _ in range(2))
    assert first == again

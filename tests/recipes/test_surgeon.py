"""Optimal Brain Surgeon: its equation, least squares under a mask, and stages that never put a weight back."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor

from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.torch_module import Layer, TorchClassifier
from recipes import zoo
from recipes.images import ImageSet
from recipes.least_squares import (
    Moments,
    checked,
    from_rows,
    moments,
    operands,
    settled_layers,
    stretch_moments,
    to_rows,
)
from recipes.patterns import NofM, Unstructured, keep_largest, obeys_n_of_m
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.masks import PrunedWeight
from recipes.prune.settings import PACKAGE, PruneSettings
from recipes.prune.surgeon import importance, remove, settle
from recipes.reconstruct import Changes, walk_blocks
from recipes.settings import load_recipe
from tests import models

SETTINGS = load_recipe(PruneSettings, PACKAGE, "obs")


def problem(seed: int, groups: int = 2, rows: int = 3, size: int = 6, count: int = 300) -> tuple[Tensor, Moments]:
    """Weights [G, R, K] and moments of correlated operands, those behind what is changed a little off."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    clean = torch.rand(groups, count, size, generator=generator, dtype=torch.float64) @ mixing
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return torch.randn(groups, rows, size, generator=generator, dtype=torch.float64), moments([(clean, noisy)])


def loss(w: Tensor, found: Moments, asked: Tensor) -> Tensor:
    """w H w^T - 2 w b^T by row [G, R]."""
    return ((w @ found.damped) * w).sum(2) - 2 * (w * asked).sum(2)


def exact(kept: Tensor, found: Moments, asked: Tensor) -> Tensor:
    """Row by row, the normal equations of the weights that stay."""
    w = torch.zeros_like(asked)
    for group, row in itertools.product(*map(range, kept.shape[:2])):
        chosen = kept[group, row].nonzero().flatten()
        own = found.damped[group][chosen][:, chosen]
        w[group, row, chosen] = torch.linalg.solve(own, asked[group, row, chosen])
    return w


@given(seed=st.integers(0, 2**16), share=st.floats(0.05, 0.95))
def test_settled_weights_solve_the_normal_equations(seed: int, share: float) -> None:
    rows, found = problem(seed)
    kept, asked = keep_largest(rows.abs(), share), found.right_side(rows)
    settled = settle(rows, kept, found.damped, asked, 60)
    assert not settled[~kept].any()
    torch.testing.assert_close(settled, exact(kept, found, asked), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 2**16), steps=st.integers(1, 8))
def test_no_step_makes_it_worse(seed: int, steps: int) -> None:
    rows, found = problem(seed)
    kept, asked = keep_largest(rows.abs(), 0.5), found.right_side(rows)
    before, after = (loss(settle(rows, kept, found.damped, asked, n), found, asked) for n in (steps - 1, steps))
    assert bool((after <= before + 1e-9 * (1 + before.abs())).all())


def test_rows_without_weights_stay_zero() -> None:
    rows, found = problem(0)
    kept = torch.ones_like(rows, dtype=torch.bool)
    kept[:, 0] = False
    settled = settle(rows, kept, found.damped, found.right_side(rows), 30)
    assert not settled[:, 0].any()
    assert bool(settled.isfinite().all())


@given(seed=st.integers(0, 2**16), out=st.integers(0, 5))
def test_a_weight_is_worth_what_the_loss_rises_by(seed: int, out: int) -> None:
    """Hassibi and Stork (1993): w_k^2 / (H^-1)_kk, from the least-squares weights, all others settled again."""
    rows, found = problem(seed)
    asked = found.right_side(rows)
    everything = torch.ones_like(rows, dtype=torch.bool)
    best = exact(everything, found, asked)
    without = everything.clone()
    without[..., out] = False
    rise = loss(exact(without, found, asked), found, asked) - loss(best, found, asked)
    torch.testing.assert_close((best[..., out] * importance(found)[..., out]).square(), rise, rtol=1e-6, atol=1e-8)


def test_moments_do_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 50, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    whole, parts = moments([(x, y)]), moments(zip(x.split(7, 1), y.split(7, 1), strict=True))
    assert whole.count == parts.count == 50
    for name in ("own", "cross", "mean", "float_mean"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    torch.testing.assert_close(whole.cross, x.mT @ y / 50)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_stages_are_better_than_one_choice(share: float) -> None:
    """Mean loss over twenty problems: by stages, at once, and by absolute value, each settled."""
    staged, once, smallest = 0.0, 0.0, 0.0
    for seed in range(20):
        rows, found = problem(seed, rows=8, size=24)
        asked = found.right_side(rows)
        rules = [partial(keep_largest, share=part) for _, part in Unstructured().by_stages(share)]
        *_, (by_stages, kept) = remove(rows, found, rules, 40)
        assert int((~kept).sum()) == round(share * kept.numel())
        *_, (at_once, _) = remove(rows, found, rules[-1:], 40)
        by_size = settle(rows, rules[-1](rows.abs()), found.damped, asked, 40)
        staged, once, smallest = (
            total + float(loss(w, found, asked).sum())
            for total, w in ((staged, by_stages), (once, at_once), (smallest, by_size))
        )
    assert staged < once < smallest


@given(share=st.floats(0.01, 0.99))
def test_stages_of_single_weights_end_at_the_share(share: float) -> None:
    parts = [part for _, part in Unstructured().by_stages(share)]
    assert parts == sorted(parts)
    assert parts[-1] == share


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_stages_of_a_pattern_are_patterns(n: int, m: int) -> None:
    layer = Layer("l", "Gemm", "x", "y", "w", None, 0, (3, 8))
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 8, generator=generator), torch.rand(1, 100, 8, generator=generator)
    choices = [partial(p.choose, layer=layer, share=part) for p, part in NofM(n, m).by_stages(1 - n / m)]
    pruned = PrunedWeight(weight, choices, SETTINGS)
    pruned.compensate(layer, moments([(x, x)]))
    assert obeys_n_of_m(pruned.tensor(), n, m, 1)
    assert pruned.sparsity == pytest.approx(1 - n / m)


@given(data=st.data())
def test_stages_of_patterns_are_few_and_end_at_the_pattern(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 300))
    n = data.draw(st.integers(1, m - 1))
    numbers = [pattern.n for pattern, _ in NofM(n, m).by_stages(1 - n / m)]
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[-1] == n
    assert 1 <= len(numbers) <= 5


@pytest.mark.parametrize("alpha", [1.0, 4.0])
@pytest.mark.parametrize("beta", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("shape", [(models.CLASSES,), (1, models.CLASSES), (1,), ()], ids=str)
def test_biases_keep_the_mean(shape: tuple[int, ...], beta: float, alpha: float, tmp_path: Path) -> None:
    """A Gemm with alpha, beta and biases of every shape: the mean of its output stays where each channel has one."""
    model = models.gemm(trans_b=1)
    model.graph.node[-1].attribute.extend(
        [onnx.helper.make_attribute("alpha", alpha), onnx.helper.make_attribute("beta", beta)]
    )
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
    values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    bias.CopyFrom(numpy_helper.from_array(values, "fc.bias"))
    path = models.write(model, tmp_path / "model.onnx")
    classifier = load_classifier(path)
    generator = torch.Generator().manual_seed(0)
    images = ImageSet(torch.rand(64, *models.IMAGE[1:], generator=generator))
    how = SETTINGS.model_copy(update={"mask_steps": 0, "steps": 0, "allocation": "uniform", "dense_first": False})
    prune(classifier, images, tmp_path / "o.onnx", how, make_goal("unstructured", 0.5))
    x = classifier.spec.to_input(images.pixels).contiguous().numpy()
    before, after = (Session(file, threads=1).run(x)[0] for file in (path, tmp_path / "o.onnx"))
    moved = float(np.abs((after - before).mean(0)).max() / np.abs(before).mean())
    assert (moved < 1e-4) == (shape[-1:] == (models.CLASSES,) and beta != 0)


def test_values_that_are_not_finite_are_refused(inverted: TorchClassifier) -> None:
    layer = inverted.layers()[0]
    broken = torch.full((1, 4, 9), torch.nan)
    with pytest.raises(MixMixError, match=r"what layer .* reads is not finite"):
        checked(moments([(broken, broken)]), layer)


def test_zeros_of_the_given_weight_stay() -> None:
    layer = Layer("l", "Gemm", "x", "y", "w", None, 0, (4, 8))
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 8, generator=generator), torch.rand(1, 100, 8, generator=generator)
    weight[:, ::2] = 0
    pruned = PrunedWeight(weight, [partial(keep_largest, share=0.6)], SETTINGS)
    pruned.compensate(layer, moments([(x, x)]))
    assert not pruned.tensor()[weight == 0].any()
    assert pruned.sparsity == pytest.approx(0.6, abs=0.02)  # those zeros are among the six in ten


@pytest.fixture(scope="module")
def inverted() -> TorchClassifier:
    return to_torch(load_classifier(zoo.model_path("inverted")))


def test_rows_and_back(inverted: TorchClassifier) -> None:
    gemm = Layer("l", "Gemm", "x", "y", "w", None, 1, (5, 3))
    for layer, weight in [(found, inverted.constant(found.weight)) for found in inverted.layers()] + [
        (gemm, torch.arange(15.0).view(5, 3))
    ]:
        rows = to_rows(weight, layer)
        assert rows.shape[:2] == (layer.groups, weight.shape[layer.axis] // layer.groups)
        assert torch.equal(from_rows(rows, layer), weight)


def test_every_layer_of_a_block_is_nearer_to_the_float_one(inverted: TorchClassifier) -> None:
    """On its own operands, each layer at 70 % without its smallest weights, and with those that stay settled."""
    generator = torch.Generator().manual_seed(0)
    x = inverted.spec.to_input(torch.rand(16, 1, 28, 28, generator=generator))
    stretches = walk_blocks(inverted, x, Changes((), {}), SETTINGS)
    outputs = settled_layers(inverted, SETTINGS)
    assert outputs == {layer.output for layer in inverted.layers()}
    for stretch in itertools.islice(stretches, 3):
        for layer in stretch.block.layers:
            weight = inverted.constant(layer.weight)
            pruned = PrunedWeight(weight, [partial(keep_largest, share=0.7)], SETTINGS)
            smallest = pruned.tensor()
            shift = pruned.compensate(layer, stretch_moments(inverted, layer, stretch, Changes((), {}), SETTINGS))
            vectors = torch.cat([*operands(inverted, layer, stretch.float_inputs, SETTINGS)], 1)
            settled, plain = (
                vectors @ (to_rows(changed, layer) - to_rows(weight, layer)).mT
                for changed in (pruned.tensor(), smallest)
            )
            settled = settled + shift.view(layer.groups, 1, -1)
            assert float(settled.square().mean()) < float(plain.square().mean())


def test_large_layers_are_left_to_training(inverted: TorchClassifier) -> None:
    settled = settled_layers(inverted, SETTINGS.model_copy(update={"compensate_inputs": 32}))
    inputs = {layer.output: to_rows(inverted.constant(layer.weight), layer).shape[2] for layer in inverted.layers()}
    assert settled == {output for output, size in inputs.items() if size <= 32}
    assert 0 < len(settled) < len(inputs)


def test_operands_in_turns_leave_gradients_on(inverted: TorchClassifier) -> None:
    x = torch.zeros(4, 1, 28, 28)
    few = SETTINGS.model_copy(update={"batch": 2})
    layer = inverted.layers()[0]
    two = (operands(inverted, layer, {inverted.input_name: x}, few) for _ in range(2))
    assert moments(zip(*two, strict=True)).count > 0
    assert torch.is_grad_enabled()

"""How much each layer gives up: less where it hurts, and together what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes.images import ImageSet
from recipes.patterns import NofM, Unstructured
from recipes.prune import shares
from tests import models
from tests.recipes.test_prune import recipe


def test_layers_that_hurt_give_up_less(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    """The share of a layer falls where its noise is made larger: its weights drive the logits more."""
    module = module_of("residual")
    x = module.spec.to_input(calibration_images.pixels)
    found = shares.by_sensitivity(module, module.layers(), x, Unstructured(), 0.6, recipe("one-shot", 0))
    assert set(found) == {layer.output for layer in module.layers()}
    assert max(found.values()) - min(found.values()) > 0.1
    assert found[module.layers()[0].output] < 0.6  # the image itself goes through the first layer


def test_two_of_four_in_some_layers_leaves_those_where_noise_is_least(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    module = module_of("inverted")
    layers = [layer for layer in module.layers() if NofM(2, 4).fits(layer)]
    x = module.spec.to_input(calibration_images.pixels[:16])
    found = shares.by_sensitivity(module, layers, x, NofM(2, 4), 0.3, recipe("one-shot", 0))
    assert set(found.values()) == {0.0, 0.5}
    noise = {}
    for layer in layers:
        weight = module.constant(layer.weight)
        cut = torch.where(NofM(2, 4).choose(weight.abs(), layer, 0.5), weight, 0.0)
        answer = module.whole({module.input_name: x}, {layer.weight: cut})[module.logits_name]
        noise[layer.output] = float((answer - module(x)).square().sum())
    per_weight = {layer.output: noise[layer.output] / layer.parameters for layer in layers}
    chosen = [per_weight[name] for name, share in found.items() if share]
    assert np.median(chosen) < np.median([per_weight[name] for name, share in found.items() if not share])


@pytest.mark.parametrize(
    ("sparsity", "changes"),
    [
        (0.5, {"dense_first": False}),  # 320 % of the only other layer
        (0.99, {"most": 0.995, "dense_first": False}),
        (0.15, {}),
    ],
)
def test_uniform_advice_helps(sparsity: float, changes: dict[str, object], tmp_path: Path) -> None:
    """A model of two layers, whose first is five times the second: what the message names, all of it and only that."""
    module = to_torch(load_classifier(models.write(models.conv(), tmp_path / "model.onnx")))
    layers, settings = module.layers(), recipe("one-shot", 0)
    zeros = shares.zeros_of(module, layers)
    if changes:
        with pytest.raises(MixMixError) as refused:
            shares.uniform(layers, sparsity, settings, zeros)
        for key in ("most", "dense_first"):
            assert (f"--set {key}=" in str(refused.value)) == (key in changes)
    found = shares.uniform(layers, sparsity, settings.model_copy(update=changes), zeros)
    assert sum(layer.parameters * found.get(layer.output, 0) for layer in layers) == pytest.approx(sparsity * 128)

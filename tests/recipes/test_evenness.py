"""Where even channels are asked for: what folding left behind, and what LayerNormalization writes, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.torch_module import TorchClassifier
from recipes.compare import compare
from recipes.evenness import EvenValue, even_values
from recipes.images import ImageSet, load_images
from recipes.inspect import inspect_model
from recipes.layer_norms import layer_norms
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from tests import models
from tests.exports import export

Modules = Callable[[str], TorchClassifier]
Load = Callable[[onnx.ModelProto], Classifier]


def fully_convolutional() -> onnx.ModelProto:
    """Convolutions: one with a bias and one without, one of a pooled value, and two whose channels are classes."""
    nodes = [
        models.node("Conv", "image a.weight a.bias", "a"),
        models.node("Relu", "a", "active"),
        models.node("Conv", "active b.weight", "b"),
        models.node("GlobalAveragePool", "b", "pooled"),
        models.node("Conv", "pooled gate.weight a.bias", "gate"),
        models.node("Mul", "b gate", "gated"),
        models.node("Conv", "gated one.weight one.bias", "one"),
        models.node("Conv", "active two.weight one.bias", "two"),
        models.node("Add", "one two", "map"),
        models.node("GlobalAveragePool", "map", "answers"),
        models.node("Flatten", "answers", "logits"),
    ]
    tensors = {"a.weight": models.weights(4, models.CHANNELS, 3, 3), "a.bias": models.weights(4, seed=1)}
    tensors |= {f"{name}.weight": models.weights(4, 4, 1, 1, seed=seed) for seed, name in enumerate(("b", "gate"), 2)}
    classes = models.CLASSES
    tensors |= {
        f"{name}.weight": models.weights(classes, 4, 1, 1, seed=seed) for seed, name in ((4, "one"), (5, "two"))
    }
    return models.assemble(nodes, tensors | {"one.bias": models.weights(classes, seed=6)})


def test_convolutions_that_batchnorm_was_folded_into(load: Load, module_of: Modules) -> None:
    """Those with a bias; not those of one place, or whose channels are classes, or that BatchNorm is behind."""
    assert even_values(to_torch(load(fully_convolutional()))) == [EvenValue("a", 1)]
    assert even_values(module_of("plain")) == []
    assert even_values(to_torch(load(models.gemm(trans_b=1)))) == []
    assert even_values(to_torch(load(models.conv(bias=False)))) == []


def shifted(*arithmetic: tuple[str, str], bias: str = "") -> onnx.ModelProto:
    """image -Conv-> value0 -arithmetic with constants, or BatchNormalization-> ... -Conv-> head."""
    nodes = [models.node("Conv", f"image w {bias}", "value0")]
    for index, (op, operand) in enumerate(arithmetic):
        value, result = f"value{index}", f"value{index + 1}"
        normalises = op == "BatchNormalization"
        nodes.append(
            models.batchnorm_node(value, result) if normalises else models.node(op, f"{value} {operand}", result)
        )
    nodes.append(models.node("Conv", f"value{len(arithmetic)} w2", "second"))
    vectors = {"m": models.weights(4, 1, 1), "s": models.weights(4, 1, 1, seed=1), "three": np.float32(3)}
    tensors = {"w": models.weights(4, models.CHANNELS, 3, 3), "w2": models.weights(4, 4, 1, 1), "b": models.weights(4)}
    return models.assemble(
        [*nodes, *models.head("second")], {**tensors, **vectors, **models.statistics(4), **models.head_tensors(4)}
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (shifted(("Mul", "m"), ("Add", "s")), "value2"),
        (shifted(("Sub", "s")), "value1"),
        (shifted(("Mul", "m"), ("Add", "s"), bias="b"), "value2"),
        (shifted(("Mul", "m"), bias="b"), "value0"),
        (shifted(("Mul", "m")), None),
        (shifted(("Add", "three")), None),
        (shifted(("Mul", "m"), ("BatchNormalization", "")), None),
        (shifted(("Mul", "m"), ("Add", "s"), ("BatchNormalization", "")), None),
    ],
    ids=["scale and shift", "shift", "bias before", "bias", "scale", "one number", "norm", "norm behind a shift"],
)
def test_what_is_added_to_each_channel_is_a_folded_norm(
    model: onnx.ModelProto, expected: str | None, load: Load
) -> None:
    """Whose end is asked to be even, and `inspect` counts it."""
    classifier = load(model)
    assert even_values(to_torch(classifier)) == ([] if expected is None else [EvenValue(expected, 1)])
    assert inspect_model(classifier).folded == (expected is not None)


def test_a_bias_that_is_computed_is_none(load: Load) -> None:
    proto = shifted(("Mul", "m"), ("Add", "s"), bias="computed")
    proto.graph.node.insert(0, models.node("GlobalAveragePool", "image", "means"))
    proto.graph.node.insert(1, models.node("ReduceMean", "means", "mean", keepdims=0))
    proto.graph.node.insert(2, models.node("Mul", "b mean", "computed"))
    assert even_values(to_torch(load(proto))) == []


def normalised_after_activation() -> onnx.ModelProto:
    """image -Conv with bias-> a -Relu-> active -BatchNormalization-> normed -Conv with bias-> b: nothing was folded."""
    nodes = [
        models.node("Conv", "image a.weight a.bias", "a"),
        models.node("Relu", "a", "active"),
        models.batchnorm_node("active", "normed"),
        models.node("Conv", "normed b.weight b.bias", "b"),
        *models.head("b"),
    ]
    tensors = {"a.weight": models.weights(4, models.CHANNELS, 3, 3), "b.weight": models.weights(4, 4, 3, 3, seed=2)}
    tensors |= {f"{name}.bias": models.weights(4, seed=1) for name in ("a", "b")}
    return models.assemble(nodes, tensors | models.statistics(4) | models.head_tensors(4))


def test_a_convolution_that_a_batchnorm_follows_lost_none(load: Load) -> None:
    assert even_values(to_torch(load(normalised_after_activation()))) == [EvenValue("b", 1)]


class ChannelsFirst(nn.Module):
    """LayerNorm of the channels of [N, C, H, W], as ConvNeXt's authors wrote it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width, 1, 1)), nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return self.weight * ((x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()) + self.bias


class Plain(nn.LayerNorm):
    """Without scale and offset."""

    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False)


class Hybrid(nn.Module):
    """Convolutions with BatchNorm, patches with LayerNorm of several kinds, and one of what is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.narrow = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.first = ChannelsFirst(8)
        self.patches, self.place = nn.Conv2d(8, 6, 4, 4), nn.Parameter(torch.rand(1, 17, 6))
        self.token = nn.Parameter(torch.rand(1, 1, 6))
        self.second, self.third, self.fourth = nn.LayerNorm(6), Plain(6), nn.LayerNorm(6)
        self.whole = nn.LayerNorm((8, 16, 16))
        self.mlp, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        for norm in (self.second, self.fourth):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.patches(self.whole(self.first(x + self.narrow(x))).relu()).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        x = x + self.mlp(self.second(x)).relu()
        return self.head(self.fourth(self.third(x).mean(1)))


@pytest.mark.parametrize(("opset", "dynamo"), [(11, False), (13, False), (17, False), (18, True)])
def test_layer_norms_are_found_whoever_wrote_them(opset: int, dynamo: bool, tmp_path: Path) -> None:
    """With scale and offset or without, of the last axis or the second; not of all axes, nor of what was pooled."""
    torch.manual_seed(0)
    network = Hybrid().eval()
    module = to_torch(export(network, tmp_path / "model.onnx", dynamo=dynamo, opset=opset))
    wanted: list[Tensor] = []
    for part in (network.first, network.second, network.third):
        part.register_forward_hook(lambda _module, _inputs, output: wanted.append(output))
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        network(x)
        norms = layer_norms(module)
        values = module.segment([module.input_name], [norm.output for norm in norms])({module.input_name: x})
    wanted = wanted if opset >= 17 else wanted[:2]  # written out without scale, it may be of anything
    assert [norm.axis for norm in norms] == [1, -1, -1][: len(wanted)]
    for norm, expected in zip(norms, wanted, strict=True):
        torch.testing.assert_close(values[norm.output], expected, rtol=1e-4, atol=1e-5)
    folded = {value.name for value in even_values(module) if value.name not in values}
    outputs = [layer.output for layer in module.layers() if layer.op == "Conv"]
    assert folded == set(outputs[:3])  # the patches have LayerNorm behind them, and never had BatchNorm


def test_the_few_convolutions_of_a_transformer_had_no_batchnorm(module_of: Modules) -> None:
    module = module_of("attention")
    assert even_values(module) == [EvenValue(norm.output, -1) for norm in layer_norms(module)]


class ClassToken(nn.Module):
    """A transformer's beginning and end: what its last LayerNorm makes of patches goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 6, 4, 4), nn.Parameter(torch.rand(1, 1, 6))
        self.first, self.mixed, self.last = nn.LayerNorm(6), nn.Linear(17, 17), nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)
        for norm in (self.first, self.last):
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.mixed(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(x)[:, 0])


@pytest.mark.parametrize(("opset", "dynamo"), [(11, False), (17, False), (18, True)])
def test_what_only_a_class_token_is_read_of_is_left_out(opset: int, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = to_torch(export(ClassToken().eval(), tmp_path / "model.onnx", dynamo=dynamo, opset=opset))
    first, _ = layer_norms(module)
    assert even_values(module) == [EvenValue(first.output, -1)]


def test_even_channels_bring_images_of_a_transformer_closer_to_real_ones(
    module_of: Modules, calibration_images: ImageSet, tmp_path: Path
) -> None:
    module = module_of("attention")
    distances = {}
    for name, unevenness in (("labels", 0.0), ("even", 1.0)):
        how = load_synth_recipe("small-labels", "fast", [f"unevenness={unevenness}"], 40, {"images": 16})
        synthesize([module], tmp_path / name, how)
        distances[name] = compare(module, load_images(tmp_path / name), calibration_images, permutations=1).distance
    assert distances["even"] < 0.7 * distances["labels"]

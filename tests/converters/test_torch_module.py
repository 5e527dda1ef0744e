"""The torch module computes what onnxruntime computes, value by value, and so do its gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import ModelError
from converters.runtime import Session
from converters.torch_module import TorchClassifier
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]

TOLERANCE = 1e-4  # of the largest magnitude: float32 sums in another order

CONVERTIBLE: dict[str, onnx.ModelProto] = {
    "conv": models.conv(),
    "conv without bias": models.conv(bias=False, group=1, strides=[2, 1]),
    "auto_pad": models.conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "asymmetric pads": models.conv(pads=[0, 1, 2, 3]),
    "opset 11": models.conv(opset=11),
    "opset 22": models.conv(opset=22),
    "gemm transB=0": models.gemm(trans_b=0),
    "gemm transB=1": models.gemm(trans_b=1, bias=False),
    "matmul": models.matmul(),
    "batchnorm": models.batchnorm(shared=True),
    "smooth": models.smooth(),
    "shared weight": models.shared_weight(),
    "weight behind Identity": models.hidden_weight(),
    "weight in a Constant": models.hidden_weight("Constant"),
    "float16 weight": models.half_weight(),
    "bfloat16 weight": models.half_weight(onnx.TensorProto.BFLOAT16),
    "split": models.split(),
    "split without sizes": models.split(sizes=False),
}


def noise(module: TorchClassifier, batch: int) -> torch.Tensor:
    spec = module.spec
    return torch.randn(batch, spec.channel_count, *spec.size)


@pytest.mark.parametrize("batch", [1, 3])
def test_embedded_model_equals_onnxruntime(embedded_path: Path, embedded_module: TorchClassifier, batch: int) -> None:
    x = noise(embedded_module, batch)
    (expected,) = Session(embedded_path, optimise=False).run(x.numpy())
    oracle.assert_close(embedded_module(x).numpy(), expected, TOLERANCE)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_built_model_equals_onnxruntime(load: Load, name: str) -> None:
    x = models.images(3)
    actual = to_torch(load(CONVERTIBLE[name]))(torch.from_numpy(x))
    oracle.assert_close(actual.numpy(), oracle.run(CONVERTIBLE[name], x), TOLERANCE)


@pytest.mark.parametrize("reshape", [None, [1, -1], [1, models.PIXELS]], ids=["Flatten", "[1, -1]", "[1, 192]"])
def test_batch_fixed_in_the_file_is_opened(load: Load, reshape: list[int] | None) -> None:
    model, x = models.fixed_batch(reshape=reshape), models.images(3)
    expected = np.concatenate([oracle.run(model, row[None]) for row in x])
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), expected, TOLERANCE)


def test_closing_softmax_is_left_out(load: Load) -> None:
    x = models.images()
    logits = to_torch(load(models.softmax()))(torch.from_numpy(x))
    oracle.assert_close(logits.softmax(-1).numpy(), oracle.run(models.softmax(), x), TOLERANCE)
    assert float(logits.sum(-1).abs().max()) > 1.1


def test_default_domain_under_its_long_name(load: Load) -> None:
    """`ai.onnx` and the empty string are one domain."""
    model = models.conv()
    model.opset_import[0].domain = "ai.onnx"
    classifier = load(model)
    assert classifier.opset == 17
    to_torch(classifier)


def test_every_value_is_a_tap(embedded: Classifier, embedded_module: TorchClassifier) -> None:
    """All float values that the file and the module both have, each against onnxruntime on the file."""
    in_file = {str(value.name) for node in embedded.original.graph for value in node.outputs}
    names = [n for step in embedded_module.steps for n in step.outputs if n in in_file and n != "logits"]
    assert len(names) >= 0.9 * (len(embedded_module.steps) - 1)
    x = noise(embedded_module, 2)
    actual = embedded_module.segment(["image"], names)({"image": x})
    floats = [name for name in names if actual[name].dtype == torch.float32]
    expected = oracle.values(embedded.original, x.numpy(), floats)
    for name in floats:
        assert oracle.difference(actual[name].numpy(), expected[name]) <= TOLERANCE, name


def test_segments_compose(embedded_module: TorchClassifier) -> None:
    """Wherever one value cuts the graph, a -> b and then b -> out is the whole, bit for bit."""
    x = noise(embedded_module, 2)
    whole, cuts = embedded_module(x), 0
    for name in [step.outputs[0] for step in embedded_module.steps[:-1]]:
        try:
            rest = embedded_module.segment([name], ["logits"])
        except ModelError:
            continue
        begin = embedded_module.segment(["image"], [name])
        assert len(begin.steps) + len(rest.steps) == len(embedded_module.steps)
        assert torch.equal(rest(begin({"image": x}))["logits"], whole)
        cuts += 1
    assert cuts >= 5


def test_segment_that_lacks_an_input(load: Load) -> None:
    module = to_torch(load(models.split()))
    with pytest.raises(ModelError, match="image cannot be computed from right"):
        module.segment(["right"], ["logits"])


def test_segment_uses_the_values_that_it_is_given(load: Load) -> None:
    """`right` is given, and must not be written over by the Split that still computes `left`."""
    module = to_torch(load(models.split()))
    values = module.segment(["image"], ["features", "left", "right"])({"image": torch.from_numpy(models.images())})
    given = values["right"] + 1
    actual = module.segment(["features", "right"], ["joined"])({"features": values["features"], "right": given})
    torch.testing.assert_close(actual["joined"], values["left"] + given.tanh(), rtol=1e-6, atol=1e-6)


def test_segment_gives_back_inputs_and_constants(load: Load) -> None:
    module = to_torch(load(models.conv()))
    x = torch.from_numpy(models.images())
    actual = module.segment(["image"], ["image", "features", "head.weight"])({"image": x})
    assert torch.equal(actual["image"], x)
    assert torch.equal(actual["head.weight"], module.constant("head.weight"))


@pytest.mark.parametrize("name", ["a.weight", "bn.mean", "b.bias", "head.weight"])
def test_parameters_are_replaced_for_one_call(load: Load, name: str) -> None:
    model, x = models.smooth(), models.images()
    module = to_torch(load(model))
    before = module(torch.from_numpy(x))
    new = module.constant(name) + 0.3 * torch.randn(module.constant(name).shape)
    actual = module.whole({"image": torch.from_numpy(x)}, parameters={name: new})["logits"]
    (tensor,) = (entry for entry in model.graph.initializer if entry.name == name)
    tensor.CopyFrom(numpy_helper.from_array(new.numpy(), name))
    oracle.assert_close(actual.numpy(), oracle.run(model, x), TOLERANCE)
    assert torch.equal(module(torch.from_numpy(x)), before)


def test_transform_is_applied_once_before_all_readers(load: Load) -> None:
    """Doubling `features`, which two nodes read, is the same as doubling the weight of the Conv that writes it."""
    model, x = models.batchnorm(shared=True), models.images()
    module, calls = to_torch(load(model)), []
    actual = module.whole(
        {"image": torch.from_numpy(x)}, transforms={"features": lambda value: calls.append(value) or 2 * value}
    )
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    oracle.assert_close(actual["logits"].numpy(), oracle.run(model, x), TOLERANCE)
    assert len(calls) == 1


def test_transforms_of_input_and_output(load: Load) -> None:
    model, x = models.smooth(), models.images()
    module = to_torch(load(model))
    actual = module.whole({"image": torch.from_numpy(x)}, transforms={"image": lambda v: -v, "logits": lambda v: v + 1})
    oracle.assert_close(actual["logits"].numpy(), oracle.run(model, -x) + 1, TOLERANCE)


@pytest.mark.parametrize("direction", range(5))
def test_gradient_equals_differences_through_onnxruntime(load: Load, direction: int) -> None:
    """Directional derivatives of a weighted sum of logits; the first direction is the gradient itself.

    Steps of h = 0.1 along a unit vector (0.007 a pixel) and of 2h, combined so that the error of order h^2 cancels.
    float32 rounds logits near 1 by about 1e-7, so each difference by 1e-6, against a gradient of norm 0.2: measured,
    1e-5 of that norm at most. 5e-5 leaves room for another machine's rounding, while a missing factor or branch
    shows as 0.07 (192 pixels share the norm).
    """
    model, x = models.smooth(), models.images(1)
    module = to_torch(load(model))
    factors = models.random(models.CLASSES, seed=11)
    pixels = torch.from_numpy(x).requires_grad_()
    (module(pixels) @ torch.from_numpy(factors)).sum().backward()
    assert pixels.grad is not None
    gradient = pixels.grad.numpy().astype(np.float64)
    along = gradient if direction == 0 else models.images(1, seed=20 + direction).astype(np.float64)
    along = along / np.linalg.norm(along)
    session = Session(model.SerializeToString(), optimise=False)

    def difference(step: float) -> float:
        ahead, behind = (session.run((x + sign * step * along).astype(np.float32))[0] for sign in (1, -1))
        return float((ahead.astype(np.float64) - behind).ravel() @ factors) / (2 * step)

    expected = (4 * difference(0.1) - difference(0.2)) / 3
    assert abs(float((gradient * along).sum()) - expected) <= 5e-5 * np.linalg.norm(gradient)


def test_every_weight_receives_a_gradient(load: Load) -> None:
    """All but the statistics of BatchNormalization, which torch keeps constant."""
    module = to_torch(load(models.smooth()))
    trained = [name for name in module.whole.constants if name not in ("bn.mean", "bn.var")]
    parameters = {name: module.constant(name).clone().requires_grad_() for name in trained}
    module.whole({"image": torch.from_numpy(models.images())}, parameters)["logits"].square().sum().backward()
    assert len(parameters) == 7
    for name, tensor in parameters.items():
        assert tensor.grad is not None, name
        assert float(tensor.grad.abs().min()) > 0, name


def test_layers_and_batchnorms_are_the_graphs(embedded_path: Path, embedded_module: TorchClassifier) -> None:
    graph = onnx.load(embedded_path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {node.output[0]: node for node in graph.node}
    layers = embedded_module.layers()
    turned = {
        x.output[0]: tensors[x.input[0]].T for x in graph.node if x.op_type == "Transpose" and x.input[0] in tensors
    }
    tensors |= turned  # a Linear on tokens is a MatMul behind the Transpose of its weight
    weighted = [out for out, x in nodes.items() if x.op_type in ("Conv", "Gemm", "MatMul") and x.input[1] in tensors]
    assert [x.output for x in layers] == weighted
    for layer in layers:
        groups = next((a.i for a in nodes[layer.output].attribute if a.name == "group"), 1)
        assert layer.groups == groups
        assert layer.shape == tensors[nodes[layer.output].input[1]].shape
        assert layer.parameters == tensors[nodes[layer.output].input[1]].size
        assert (layer.bias is None) == (len(nodes[layer.output].input) < 3)
    norms = embedded_module.batchnorms()
    assert [norm.output for norm in norms] == [o for o, node in nodes.items() if node.op_type == "BatchNormalization"]
    for norm in norms:
        np.testing.assert_array_equal(norm.mean.numpy(), tensors[nodes[norm.output].input[3]])
        np.testing.assert_array_equal(norm.variance.numpy(), tensors[nodes[norm.output].input[4]])


@pytest.mark.parametrize(
    ("model", "axis", "op"),
    [
        (models.conv(), 0, "Conv"),
        (models.hidden_weight(), 0, "Conv"),
        (models.gemm(trans_b=1), 0, "Gemm"),
        (models.gemm(trans_b=0), 1, "Gemm"),
        (models.matmul(), 1, "MatMul"),
    ],
)
def test_axis_of_a_layer_counts_its_channels(load: Load, model: onnx.ModelProto, axis: int, op: str) -> None:
    module = to_torch(load(model))
    layer = module.layers()[0]
    written = module.segment(["image"], [layer.output])({"image": torch.from_numpy(models.images())})[layer.output]
    assert (layer.op, layer.axis) == (op, axis)
    assert layer.shape[axis] == written.shape[1]

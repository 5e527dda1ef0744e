"""The nine `light_*` models of onnx: real architectures, their weights constants, their outputs shipped beside them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import torch
from onnx import helper, numpy_helper

from converters.conversion import relative_difference, to_torch
from converters.load import load_classifier

FOLDER = Path(onnx.backend.test.__path__[0]) / "data" / "light"
NAMES = sorted(path.stem for path in FOLDER.glob("light_*.onnx"))


def difference_from_shipped(name: str) -> float:
    """The converted model's largest difference from the output in the package, relative to its largest number.

    The image is 0, 1/n, 2/n, ... for n pixels: the test runner of onnx has it so.
    """
    path = FOLDER / f"{name}.onnx"
    expected = numpy_helper.to_array(onnx.TensorProto.FromString((FOLDER / f"{name}_output_0.pb").read_bytes()))
    classifier = load_classifier(path)
    shape = (1, 3, *classifier.spec.size)
    x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) / math.prod(shape)
    with torch.no_grad():
        logits = to_torch(classifier)(x.float())
    actual = logits.softmax(1) if classifier.output_kind == "softmax" else logits
    return relative_difference(actual.numpy(), expected.reshape(actual.shape))


def seeded(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model with random weights where it has constants: every ConstantOfShape becomes an initializer."""
    model = onnx.load(FOLDER / f"{name}.onnx")
    generator = np.random.default_rng(seed)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    readers = {operand: (node, place) for node in model.graph.node for place, operand in enumerate(node.input)}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            kept.append(node)
            continue
        shape = shapes[node.input[0]].tolist()
        array = _weights(*readers[node.output[0]], shape, generator)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _weights(reader: onnx.NodeProto, place: int, shape: list[int], generator: np.random.Generator) -> np.ndarray:
    """Numbers that keep activations alive: He's deviation for weights, near the identity for everything else."""
    if len(shape) > 1:
        transposed = any(helper.get_attribute_value(a) for a in reader.attribute if a.name == "transB")
        rows_first = reader.op_type == "Conv" or transposed
        fan_in = math.prod(shape[1:]) if rows_first else shape[0]
        return generator.standard_normal(shape, np.float32) * math.sqrt(2 / fan_in)
    near = {("BatchNormalization", 1): 1.0, ("BatchNormalization", 4): 1.0, ("Mul", 1): 1.0}
    return near.get((reader.op_type, place), 0.0) + generator.uniform(-0.3, 0.3, shape)

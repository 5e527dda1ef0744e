"""From a classifier to its torch module: an operator for every node, and the module held against onnxruntime."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from converters import graphs
from converters.classifier import Classifier
from converters.errors import ConversionError, MixMixError, ModelError, UnsupportedOperatorError
from converters.ops import registry
from converters.ops.advice import what_helps
from converters.runtime import Session
from converters.torch_module import Segment, TorchClassifier

TOLERANCE = 1e-4
"""Largest difference from onnxruntime, relative to the largest magnitude of the output, that a conversion may have."""

OTHER_FLOAT_TOLERANCE = 2e-2
"""The same for a file that computes in 16 bits, as onnxruntime does then and the module does not."""

ROUNDED = ("QuantizeLinear", "Truncate")

FLIP_TOLERANCE = 5e-2
"""The same for a file with quantized activations or resized bytes: float noise may move a value over a rounding
boundary, that is by a whole step."""

ROUNDING = 10.0
"""How much more than its own rounding a conversion may differ by, in models that make much of the last digits."""

MOST_ROUNDING = 1e-2
"""What no rounding excuses."""

LIGHT = 1 << 16  # bytes; what decides how a node is converted, sizes and axes, is far below


def to_torch(classifier: Classifier, *, check: bool = True) -> TorchClassifier:
    """Convert and, unless `check` is False, compare with onnxruntime on random input.

    Raises UnsupportedOperatorError, or ConversionError naming the first value that differs.
    """
    try:
        operators = find_operators(classifier)
        expectation = _Expectation(classifier) if check else None  # before the weights, which it holds for a while too
        module = TorchClassifier(classifier, operators).eval().requires_grad_(False)
        if expectation is not None:
            expectation.hold(module)
    except MixMixError:
        raise
    except Exception as error:  # a damaged field can lead anywhere
        raise ModelError(f"{classifier.path} is damaged ({type(error).__name__}): fetch or export it again") from error
    return module


def seeded_input(classifier: Classifier, count: int, seed: int = 0) -> Tensor:
    """`count` images of uniform noise through the input spec, as the type of the file's input keeps them."""
    spec, generator = classifier.spec, torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, spec.channel_count, *spec.size, generator=generator)
    return classifier.as_stored(spec.to_input(pixels)).contiguous()


class _Expectation:
    """What onnxruntime makes of seeded noise through the input spec: logits of the file, optimisations off.

    Two images, or two batches of what the file insists on, so that any batch size is tried.
    """

    def __init__(self, classifier: Classifier, seed: int = 0) -> None:
        self.classifier = classifier
        self.x = seeded_input(classifier, 2 * (classifier.fixed_batch or 1), seed)
        self.logits = self._ask()
        if not np.isfinite(self.logits.astype(np.float64)).all():
            raise ModelError(
                f"{classifier.path}: onnxruntime itself gets NaN or infinity on ordinary pixels: a weight is damaged,"
                " or the input spec is far off; export the model again, or set --mean, --std and --scale"
            )
        shape = self.logits.shape
        if self.logits.ndim < 2 or not 0 < math.prod(shape[1:]) == max(shape[1:]):
            raise ModelError(
                f"{classifier.path}: output {classifier.output_name} has shape {list(shape)},"
                " not [batch, classes]: it is not an image classifier"
            )
        self.logits = self.logits.reshape(len(self.x), -1).astype(np.float32)

    def _ask(self) -> np.ndarray:
        """Logits of the images. Raises ConversionError where onnxruntime takes one image alone."""
        session, batch = self.classifier.session(optimise=False), self.classifier.fixed_batch
        try:
            return session.run_in_batches(self.x.numpy(), batch or len(self.x))
        except ModelError as error:
            if batch is not None:
                raise
            try:
                session.run(self.x[:1].numpy())
            except ModelError:
                raise error from None
            raise self._bound(f"onnxruntime does not run it on {len(self.x)} images") from error

    @torch.no_grad()
    def hold(self, module: TorchClassifier) -> float:
        """The module's largest relative difference. Raises ConversionError when it is too large."""
        try:
            actual = module(self.x).numpy()
        except UnsupportedOperatorError:
            raise
        except Exception as error:  # whatever an operator runs into
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if self._runs_as_exported(module):
                raise self._bound(f"it does not run on {len(self.x)} images ({reason})") from error
            raise ConversionError(
                f"{self.classifier.path}: the converted model does not run ({reason}): please report it"
            ) from error
        if len(actual) != len(self.x):
            raise self._bound(f"it computes {len(actual)} of {len(self.x)} images")
        difference = relative_difference(actual, self.logits)
        tolerance = OTHER_FLOAT_TOLERANCE if self.classifier.other_floats else TOLERANCE
        if any(step.op in ROUNDED for step in module.whole.steps):
            tolerance = FLIP_TOLERANCE
        if difference <= tolerance or is_rounding(difference, module, self.x):
            return difference
        first = _first_difference(module, self.x[: self.classifier.fixed_batch or 1])
        where = "" if first is None else f", first at value {first[0]!r} ({first[1]:.1e})"
        raise ConversionError(
            f"{self.classifier.path}: the converted model differs from onnxruntime by {difference:.1e}{where}:"
            " please report it"
        )

    def _runs_as_exported(self, module: TorchClassifier) -> bool:
        """Whether the module takes as many images as the file insists on."""
        batch = self.classifier.fixed_batch
        try:
            return batch is not None and len(module(self.x[:batch])) == batch
        except Exception:  # whatever an operator runs into
            return False

    def _bound(self, what: str) -> ConversionError:
        return ConversionError(
            f"{self.classifier.path}: its batch size is wound into the graph, so that {what}: export it with an open"
            " batch size"
        )


@torch.no_grad()
def is_rounding(difference: float, module: TorchClassifier, x: Tensor) -> bool:
    """Whether a relative difference of logits is about what float32 alone makes on `x`, and not too much at that.

    That is how far the module is from its own output in float64; some models make much of the last digits.
    """
    try:
        single = module(x).numpy()
        alone = relative_difference(single, module.double()(x.double()).numpy())
    except Exception:  # a Cast in the graph brings float32 back, which some operators do not mix
        return False
    finally:
        module.float()
    return difference <= min(ROUNDING * alone, MOST_ROUNDING)


def find_operators(classifier: Classifier) -> list[registry.Found]:
    """Each node of the normalised graph with its operator, in order. Raises UnsupportedOperatorError."""
    graph, versions = _light_graph(classifier)
    others = registry.Onnx2Torch(graph)
    try:
        return [(node, registry.find(node, others, versions.get(node.domain, 1))) for node in graph.node]
    except UnsupportedOperatorError as error:
        raise UnsupportedOperatorError(f"{classifier.path}: {error}") from error


@dataclass(frozen=True)
class Unsupported:
    """A node that cannot be converted, and what would help."""

    op: str
    opset: int
    node: str
    help: str

    def __str__(self) -> str:
        return f"node {self.node} is {self.op} (opset {self.opset}), which cannot be converted: {self.help}"


def unsupported_operators(classifier: Classifier) -> list[Unsupported]:
    """Everything that keeps the model from being converted."""
    graph, versions = _light_graph(classifier)
    others, found = registry.Onnx2Torch(graph), []
    for node in graph.node:
        opset = versions.get(node.domain, 1)
        try:
            registry.find(node, others, opset)
        except UnsupportedOperatorError:
            help_ = what_helps(node.op_type, node.domain)
            found.append(Unsupported(node.op_type, opset, node.name or registry.first_output(node), help_))
    return found


def _light_graph(classifier: Classifier) -> tuple[onnx.GraphProto, dict[str, int]]:
    """The normalised graph, large tensors left out, and the opset of each domain."""
    light = classifier.normal.clone()
    for name, value in light.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > LIGHT:
            kind, shape = ir.DataType(tensor.dtype), graphs.shape_of(tensor)
            value.const_value = ir.ExternalTensor("left out", 0, tensor.nbytes, kind, shape=shape, name=name)
    proto = ir.to_proto(light)
    return proto.graph, {entry.domain: entry.version for entry in proto.opset_import}


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |actual - expected| / max |expected|; infinite where shapes differ, NaN where either is."""
    if actual.shape != expected.shape:
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(actual - expected).max(initial=0.0)) / max(scale, 1e-12)


def _first_difference(module: TorchClassifier, x: Tensor) -> tuple[str, float] | None:
    """The first value, in order, that onnxruntime computes differently from the normalised graph, if there is one."""
    classifier = module.classifier
    probe = classifier.normal.clone()
    names = [  # the first output is computed always, others where the operator has them
        n
        for s in module.whole.steps
        for n in (s.outputs[:1] if s.op in ("BatchNormalization", "Dropout", "MaxPool") else s.outputs)
        if n and n != classifier.logits
    ]
    values = graphs.values_by_name(probe.graph)
    floats = [n for n in names if values[n].dtype in (ir.DataType.FLOAT, None)]
    probe.graph.outputs.extend(values[n] for n in floats)
    for name in floats:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
    try:
        session = Session(probe, optimise=False, name=str(classifier.path))
        expected = dict(zip(session.output_names, session.run(x.contiguous().numpy()), strict=True))
    except ModelError:  # the normalised graph may be one for this converter alone, where a Concat repeats a constant
        return None
    compared = [*floats, classifier.logits]
    actual = Segment(module, [module.input_name], compared)({module.input_name: x})
    for name in compared:
        difference = relative_difference(actual[name].numpy(), expected[name])
        if not difference <= TOLERANCE:
            return name, difference
    return None

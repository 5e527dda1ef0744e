"""Results go into a copy of the original graph: quantized weights, activation Q/DQ pairs, changed float tensors.

A weight is replaced at the node that reads it, not at the initializer: DequantizeLinear of a new integer initializer
is wired to that operand. Shared, Identity-hidden and Constant-node weights need no care of their own that way: others
go on reading the old tensor, and what nobody reads any more is removed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from converters import graphs, passes, precision, steps
from converters.classifier import Classifier, build, logits_session
from converters.endings import find_ending
from converters.errors import ConversionError, ModelError, OutputError
from converters.input_spec import METADATA_PREFIX
from converters.outputs import TEMPORARY, ensure_writable, write_atomically
from converters.runtime import Session, fits_protobuf, serialise
from converters.targets import PLAIN_IR, PLAIN_OPSET, Container, Target
from converters.torch_module import OTHER_FLOAT_TOLERANCE, relative_difference, seeded_input

BIAS = 2  # operand position
RAISED_TOLERANCE = 1e-3
"""Largest relative difference of logits at another opset.

Ten times what a conversion may have, for models that magnify rounding; a shift of half a pixel before a global mean may
be no more than twice of it.
"""


@dataclass(frozen=True)
class WeightEdit:
    """Integers for the weight of the node that writes `output`.

    `values` has the weight's own shape; `scale` (float32, > 0) and `zero_point` have one entry a channel of `axis`.
    The file holds `values`, which have `bits` bits, in `container`; real = (value - zero_point) * scale.
    """

    output: str
    values: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int
    bits: int
    container: Container
    index: int = 1
    """The weight's operand position."""


@dataclass(frozen=True)
class TensorEdit:
    """A new constant for operand `index` of the node that writes `output`; a bias that was absent is added."""

    output: str
    index: int
    values: NDArray[np.float32] | NDArray[np.int64]


@dataclass(frozen=True)
class BiasEdit:
    """A bias as integers: `values` (int32) times `scale` (float32), both [C], for the node that writes `output`."""

    output: str
    values: NDArray[np.int32]
    scale: NDArray[np.float32]


@dataclass(frozen=True)
class AttributeEdit:
    """Another number for an attribute of the node that writes `output`."""

    output: str
    name: str
    value: int


@dataclass(frozen=True)
class ActivationEdit:
    """QuantizeLinear and DequantizeLinear on the named value, per tensor, for everything that reads it."""

    value: str
    scale: float
    zero_point: int
    bits: int
    container: Container


@dataclass(frozen=True)
class Proof:
    """Inputs [N, ...] of which `batch` are run at once, and the logits that a file has to give on them."""

    inputs: NDArray[np.float32]
    logits: NDArray[np.float32]
    batch: int
    tolerance: float
    """Largest relative difference."""
    quantized: steps.Quantized | None = None
    """What is compared instead, value by value, where logits differ by more and activations are quantized."""


Edit = WeightEdit | TensorEdit | BiasEdit | AttributeEdit | ActivationEdit


def prepare_for_quantization(
    classifier: Classifier, target: Target, bits: int, act_bits: int | None = None
) -> Classifier:
    """The graph that quantization writes into: the original with BatchNorm folded, at the opset its types need.

    Per-channel weight quantization commutes with the fold, the file loses four vectors a layer, and Conv stands next
    to what follows it, which is what fusing runtimes look for.
    """
    return _prepare(classifier, *target.needs(bits, act_bits))


def prepare_for_pruning(classifier: Classifier) -> Classifier:
    """The graph that pruning writes into: the original with BatchNorm folded, so that a weight's size is its effect."""
    return _prepare(classifier, PLAIN_OPSET, PLAIN_IR)


def prepare_for_training(classifier: Classifier) -> Classifier:
    """The graph that distillation writes into: the original, BatchNorm and all, in float32."""
    model = _float_copy(classifier)
    passes.tidy(model)
    return build(classifier.path, model, classifier.spec, classifier.sha256, size_bytes=classifier.size_bytes)


def _float_copy(classifier: Classifier) -> ir.Model:
    if classifier.quantized:
        raise ModelError(f"{classifier.path} is quantized already: give the float model that it was made from")
    model = classifier.original.clone()
    precision.to_float32_inside(model)
    return model


def _prepare(classifier: Classifier, opset: int, ir_version: int) -> Classifier:
    model = _float_copy(classifier)
    common.RemoveInitializersFromInputsPass()(model)  # which keeps a weight in the file that nothing reads any more
    raised = passes.raise_opset(model, opset, str(classifier.path))
    model.ir_version = max(passes.least_ir(model), ir_version)  # older runtimes refuse what new exporters write
    passes.fold_constants(model)  # weights behind a Cast too are to take in what follows
    passes.fold_batchnorm(model)
    passes.tidy(model)
    prepared = build(classifier.path, model, classifier.spec, classifier.sha256, size_bytes=classifier.size_bytes)
    if raised:
        _prove_raised(classifier, prepared)
    return prepared


def _prove_raised(classifier: Classifier, prepared: Classifier) -> None:
    """Raise ConversionError where the graph, at another opset, does not answer as the file does.

    A file that onnxruntime does not run, or not to finite numbers, is not judged here: whoever runs it says why.
    """
    x = seeded_input(classifier, classifier.fixed_batch or 1).numpy()
    try:
        expected = classifier.session(optimise=False).run(x)[0].astype(np.float32)
    except ModelError:
        return
    if not np.isfinite(expected).all():
        return
    actual = prepared.session(optimise=False).run(x)[0]
    difference = relative_difference(actual.reshape(expected.shape), expected)
    if not difference <= (OTHER_FLOAT_TOLERANCE if classifier.other_floats else RAISED_TOLERANCE):
        raise ConversionError(
            f"{classifier.path}: at opset {prepared.opset} it answers otherwise than at its own, {classifier.opset}"
            f" (by {difference:.1e}): export it at opset {prepared.opset}, and please report it"
        )


def edited_classifier(prepared: Classifier, edits: Iterable[Edit]) -> Classifier:
    """A prepared classifier with edits made, to go on with before anything is written."""
    model = apply(prepared.original, edits)
    return build(prepared.path, model, prepared.spec, prepared.sha256, size_bytes=prepared.size_bytes)


def apply(model: ir.Model, edits: Iterable[Edit]) -> ir.Model:
    """A copy of `model` with the edits made. Raises KeyError for a value that the graph does not have."""
    edited = model.clone()
    graph = edited.graph
    values = {str(v.name): v for node in graph for v in node.outputs} | {str(v.name): v for v in graph.inputs}
    for edit in edits:
        match edit:
            case WeightEdit():
                _wire(values[edit.output], edit.index, _dequantized_weight(graph, values[edit.output], edit))
            case TensorEdit():
                _replace_tensor(graph, values[edit.output], edit)
            case BiasEdit():
                _wire(values[edit.output], BIAS, _dequantized_bias(graph, values[edit.output], edit))
            case AttributeEdit():
                _producer(values[edit.output]).attributes[edit.name] = ir.AttrInt64(edit.name, edit.value)
            case ActivationEdit():
                _quantize_activation(graph, values[edit.value], edit)
    common.RemoveUnusedNodesPass()(edited)
    return edited


def _replace_tensor(graph: ir.Graph, output: ir.Value, edit: TensorEdit) -> None:
    """A tensor that only this operand reads keeps its name; others get a new one."""
    node = _producer(output)
    old = node.inputs[edit.index] if edit.index < len(node.inputs) else None
    if old is not None and graphs.is_constant(old) and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(edit.values, name=old.name)
        old.shape = ir.Shape(edit.values.shape)
        return
    name = str(old.name) if old is not None else f"{edit.output}.bias"
    _wire(output, edit.index, graphs.add_initializer(graph, graphs.unused_name(graph, name), edit.values))


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise KeyError(f"{value.name} is an input, not a node's output")
    return node


def _operand_name(node: ir.Node, index: int) -> str | None:
    operand = node.inputs[index] if index < len(node.inputs) else None
    return str(operand.name) if operand is not None else None


def _wire(output: ir.Value, index: int, new: ir.Value) -> None:
    node = _producer(output)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new)


def _integers(graph: ir.Graph, name: str, values: np.ndarray, container: Container, bits: int) -> ir.Value:
    """An initializer of the container's type. Raises ValueError when a value does not fit in `bits` bits."""
    low, high = container.bounds(bits)
    if values.min(initial=0) < low or values.max(initial=0) > high:
        raise ValueError(f"{name}: integers outside [{low}, {high}]")
    tensor = ir.tensor(values.astype(container.numpy), dtype=container.dtype, name=graphs.unused_name(graph, name))
    return graphs.add_initializer(graph, str(tensor.name), tensor)


def _dequantized_weight(graph: ir.Graph, output: ir.Value, edit: WeightEdit) -> ir.Value:
    node = _producer(output)
    name = _operand_name(node, edit.index) or f"{edit.output}.weight"
    operands = [
        _integers(graph, f"{name}.q", edit.values, edit.container, edit.bits),
        graphs.add_initializer(graph, graphs.unused_name(graph, f"{name}.scale"), edit.scale),
        _integers(graph, f"{name}.zero", edit.zero_point, edit.container, edit.bits),
    ]
    return _dequantize_before(graph, node, operands, edit.axis, name, f"{node.name or edit.output}/weight/DQ")


def _dequantized_bias(graph: ir.Graph, output: ir.Value, edit: BiasEdit) -> ir.Value:
    """Zero point 0, as integer kernels ask for, is what DequantizeLinear has without one."""
    node = _producer(output)
    name = _operand_name(node, BIAS) or f"{edit.output}.bias"
    operands = [
        graphs.add_initializer(graph, graphs.unused_name(graph, f"{name}.q"), edit.values),
        graphs.add_initializer(graph, graphs.unused_name(graph, f"{name}.scale"), edit.scale),
    ]
    return _dequantize_before(graph, node, operands, 0, name, f"{node.name or edit.output}/bias/DQ")


def _dequantize_before(
    graph: ir.Graph, node: ir.Node, operands: list[ir.Value], axis: int, value: str, name: str
) -> ir.Value:
    dequantize = ir.node("DequantizeLinear", operands, attributes={"axis": axis}, name=name)
    dequantize.outputs[0].name = graphs.unused_name(graph, f"{value}.dequantized")
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def _dequantizer_of(value: str) -> str:
    """The name of the node that a quantized value is read from."""
    return f"{value}/DQ"


def _dequantized(graph: ir.Graph, names: Iterable[str]) -> dict[str, str]:
    """What those values are read as, once quantized."""
    nodes = {str(node.name): node for node in graph if node.op_type == "DequantizeLinear"}
    return {name: str(nodes[_dequantizer_of(name)].outputs[0].name) for name in names}


def _quantize_activation(graph: ir.Graph, value: ir.Value, edit: ActivationEdit) -> None:
    readers = [(node, index) for node, index in value.uses()]
    scale = np.array(edit.scale, np.float32)
    parameters = [
        graphs.add_initializer(graph, graphs.unused_name(graph, f"{edit.value}.scale"), scale),
        _integers(graph, f"{edit.value}.zero", np.array(edit.zero_point), edit.container, edit.bits),
    ]
    first, inserted = value, []
    if edit.bits < edit.container.bits:  # saturate to the bits first
        bounds = tuple(end - edit.zero_point for end in edit.container.bounds(edit.bits))
        names = (f"{edit.value}.low", f"{edit.value}.high")
        operands = [
            graphs.add_initializer(graph, graphs.unused_name(graph, name), np.array(bound * scale, np.float32))
            for name, bound in zip(names, bounds, strict=True)
        ]
        inserted.append(ir.node("Clip", [value, *operands], name=f"{edit.value}/Clip"))
        first = inserted[0].outputs[0]
        first.name = graphs.unused_name(graph, f"{edit.value}.clipped")
    quantize = ir.node("QuantizeLinear", [first, *parameters], name=f"{edit.value}/Q")
    quantize.outputs[0].name = graphs.unused_name(graph, f"{edit.value}.q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], name=_dequantizer_of(edit.value))
    dequantize.outputs[0].name = graphs.unused_name(graph, f"{edit.value}.dequantized")
    inserted += [quantize, dequantize]
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), inserted)
    else:
        graph.insert_after(producer, inserted)
    for node, index in readers:
        node.replace_input_with(index, dequantize.outputs[0])


def save(
    model: ir.Model,
    path: Path,
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    check: Callable[[], None] | None = None,
) -> int:
    """Write the model with `metadata` added, and return its bytes; nothing appears under `path` unless all went well.

    onnxruntime loads the bytes, `check` may judge the model, and only then is the temporary file renamed. Raises
    OutputError when `path` exists (without `overwrite`) or cannot be written.
    """
    ensure_writable(path, overwrite=overwrite)
    stamp(model, metadata)
    if not fits_protobuf(model):
        return _save_with_external_data(model, path, check, overwrite=overwrite)
    content = serialise(model)
    Session(content, name=str(path))
    if check is not None:
        check()
    write_atomically(path, content)
    return len(content)


def stamp(model: ir.Model, metadata: Mapping[str, str]) -> None:
    """Add `metadata` in place; an input spec replaces the one before, key and all."""
    if any(key.startswith(METADATA_PREFIX) for key in metadata):
        for key in [key for key in model.metadata_props if key.startswith(METADATA_PREFIX)]:
            del model.metadata_props[key]
    model.metadata_props.update(metadata)


def save_proved(
    model: ir.Model,
    path: Path,
    metadata: Mapping[str, str],
    proof: Proof,
    *,
    overwrite: bool = False,
) -> tuple[int, float]:
    """`save`, once onnxruntime has given the logits of `proof` back: bytes written, and the relative difference.

    Where the difference is above the proof's tolerance, every quantized value has to be what was computed (`steps`).
    Raises ConversionError, and writes nothing, where it is not, or there is none.
    """
    difference = math.nan

    def check() -> None:
        nonlocal difference
        difference = difference_from(model, proof.inputs, proof.logits, path, proof.batch)
        if difference <= proof.tolerance:
            return
        if proof.quantized is None:
            raise ConversionError(
                f"{path}: the written model differs from the computed one by {difference:.1e}: please report it"
            )
        values = _dequantized(model.graph, proof.quantized.steps)
        logits = str(find_ending(model.graph, path).logits.name)
        batch = proof.inputs[np.arange(proof.batch) % len(proof.inputs)]
        steps.hold(model, values, logits, batch, proof.quantized, path)

    return save(model, path, metadata, overwrite=overwrite, check=check), difference


def stored_size(model: ir.Model) -> int:
    """Bytes that the model takes on disk, in one file or two."""
    if fits_protobuf(model):
        return len(serialise(model))
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def data_beside(path: Path) -> Path:
    """Where the weights of a model go that is too large for one file."""
    return path.with_name(f"{path.name}.data")


def _save_with_external_data(model: ir.Model, path: Path, check: Callable[[], None] | None, *, overwrite: bool) -> int:
    """The weights of a model that is too large for one file go to `NAME.onnx.data` beside it; bytes of both."""
    data = data_beside(path)
    ensure_writable(data, overwrite=overwrite)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as folder:
            written = Path(folder) / path.name
            ir.save(model, written, external_data=data.name)
            Session(written, name=str(path))
            if check is not None:
                check()
            written.with_name(data.name).replace(data)
            written.replace(path)
            return path.stat().st_size + data.stat().st_size
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): choose another output") from error


def difference_from(
    model: ir.Model, x: NDArray[np.float32], expected: NDArray[np.float32], path: Path, batch: int
) -> float:
    """The relative difference of a written model's logits in onnxruntime, optimisations off, from `expected` ones.

    `x` holds any number of inputs, of which `batch` are run at once.

    Raises ModelError when the model does not run.
    """
    session = logits_session(model, model, find_ending(model.graph, path), str(path), optimise=False)
    actual = session.run_in_batches(x, batch).astype(np.float32).reshape(expected.shape)
    difference = relative_difference(actual, expected)
    if not np.isfinite(difference):
        raise ModelError(f"{path}: the written model gives another shape or NaN: please report it")
    return difference

"""Graph passes: an ordered, visible list, each saying whether it changed the model.

`NORMALISE` makes a private copy easy to convert (one spelling for everything, constants folded); nothing of it is ever
written to a user's file. `fold_batchnorm` is what `quantize` and `prune` do to the graph that they write.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.version_converter
from onnx_ir.passes import common

from converters.errors import ModelError

Pass = Callable[[ir.Model], bool]
"""Changes the model in place and returns whether it did."""

BATCHNORM_EPSILON = 1e-5  # the operator's default
BATCH = "batch"
FIXED_BATCH = "mixmix.fixed_batch"
FOLD_LIMIT = 1 << 26  # bytes: fold whatever is constant; the shape arithmetic of exporters is far below this


def normalise(model: ir.Model) -> list[str]:
    """Run NORMALISE on `model` in place; the names of the passes that changed it."""
    return [name for name, change in NORMALISE if change(model)]


def _shared(pass_: ir.passes.PassBase) -> Pass:
    return lambda model: bool(pass_(model).modified)


def open_batch(model: ir.Model) -> bool:
    """A batch dimension fixed in the file becomes symbolic, and stale inferred shapes are forgotten."""
    changed = False
    fixed = {
        v.shape[0] for v in model.graph.inputs if v.shape is not None and len(v.shape) and isinstance(v.shape[0], int)
    }
    if len(fixed) == 1:
        model.meta[FIXED_BATCH] = fixed.pop()
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None and len(value.shape) > 0 and isinstance(value.shape[0], int):
            value.shape = ir.Shape([BATCH, *list(value.shape)[1:]])
            changed = True
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    return changed


def fold_constants(model: ir.Model) -> bool:
    """Evaluate what does not depend on the input: the shape arithmetic, casts and identities of exporters."""
    result = onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=FOLD_LIMIT,
        output_size_limit=FOLD_LIMIT,
        should_fold=lambda node: True if node.op_type == "ConstantOfShape" else None,  # it leaves those by default
    )
    return bool(result.modified)


def keep_batch_in_reshape(model: ir.Model) -> bool:
    """A Reshape to [size of the batch, constants] becomes one to [0, constants], which copies the first dimension.

    The size may be computed, or be the constant that a file with a fixed batch has there.

    Exporters read the batch size off the image itself. That side path runs past every layer, so no block could end
    before it, and it ties a stretch of the graph to the image.
    """
    changed = False
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        allow_zero = node.attributes.get("allowzero")
        source = node.inputs[0].shape
        if (allow_zero is not None and allow_zero.as_int()) or source is None or source[0] != BATCH:
            continue
        rest = _after_batch(node.inputs[1], model.meta.get(FIXED_BATCH))
        if rest is None:
            continue
        shape = np.concatenate([np.zeros(1, np.int64), rest]).astype(np.int64)
        name = unused_name(model.graph, f"{node.outputs[0].name}.shape")
        node.replace_input_with(1, add_initializer(model.graph, name, shape))
        changed = True
    return changed


def _after_batch(target: ir.Value, fixed: int | None) -> np.ndarray | None:
    """The constant sizes behind the batch's in a Reshape's target; None where it does not begin with the batch."""
    constant = ir.convenience.get_const_tensor(target)
    if constant is not None:
        sizes = constant.numpy()
        return sizes[1:] if fixed is not None and len(sizes) > 1 and sizes[0] == fixed else None
    concat = target.producer()
    if concat is None or concat.op_type != "Concat" or not _is_batch_size(concat.inputs[0]):
        return None
    tensors = [None if value is None else ir.convenience.get_const_tensor(value) for value in concat.inputs[1:]]
    parts = [np.atleast_1d(tensor.numpy()) for tensor in tensors if tensor is not None]
    return np.concatenate(parts) if parts and len(parts) == len(tensors) else None


def _is_batch_size(value: ir.Value | None) -> bool:
    """Whether a value is element 0 of the Shape of something, as exporters spell the size of the batch."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Unsqueeze", "Cast", "Squeeze", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Shape":
        end = node.attributes.get("end")
        return end is not None and end.as_int() == 1
    index = node.inputs[1] if len(node.inputs) > 1 else None
    taken = ir.convenience.get_const_tensor(index) if index is not None else None
    source = node.inputs[0].producer()
    takes_first = node.op_type == "Gather" and taken is not None and not taken.numpy().any()
    return takes_first and source is not None and source.op_type == "Shape"


def unshare_weights(model: ir.Model) -> bool:
    """Give every operand of a weighted layer an initializer of its own, so that layers are changed one by one."""
    seen: set[ir.Value] = set()
    changed = False
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if index == 0 or value is None or not is_constant(value) or node.op_type not in LAYERS:
                continue
            if value in seen:
                copy = add_initializer(model.graph, unused_name(model.graph, str(value.name)), to_numpy(value))
                node.replace_input_with(index, copy)
                changed = True
            seen.add(value)
    return changed


LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators whose second operand, when constant, is the weight of a layer that can be quantized or pruned."""

NORMALISE: tuple[tuple[str, Pass], ...] = (
    ("inline functions", _shared(common.InlinePass())),
    ("initializers are not inputs", _shared(common.RemoveInitializersFromInputsPass())),
    ("open batch", open_batch),
    ("fold constants", fold_constants),
    ("keep batch in reshape", keep_batch_in_reshape),
    (
        "constants are initializers",
        _shared(common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
    ),
    ("remove identities", _shared(common.IdentityEliminationPass())),
    ("remove unused nodes", _shared(common.RemoveUnusedNodesPass())),
    ("one initializer a layer", unshare_weights),
    ("sort", _shared(common.TopologicalSortPass())),
    ("fix names", _shared(common.NameFixPass())),
)


def fold_batchnorm(model: ir.Model) -> bool:
    """Fold every BatchNormalization that alone follows a Conv into that Conv's weight and bias.

    W' = W * gamma / sqrt(var + eps) per output channel, b' = beta + (b - mean) * gamma / sqrt(var + eps). Shared
    initializers are copied on write; the value that the BatchNormalization wrote keeps its name.
    """
    changed = False
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or not node.inputs or node.inputs[0] is None:
            continue
        source = node.inputs[0]
        conv = source.producer()
        parameters = [constant_behind(value) for value in node.inputs[1:5]]
        training = node.attributes.get("training_mode")
        foldable = (
            conv is not None
            and conv.op_type == "Conv"
            and len(source.uses()) == 1
            and not source.is_graph_output()
            and all(value is not None for value in parameters)
            and (training is None or training.as_int() == 0)
        )
        if foldable and conv is not None:
            changed |= _fold_into(model.graph, conv, node, [to_numpy(v) for v in parameters if v is not None])
    if changed:
        common.RemoveUnusedNodesPass()(model)
    return changed


def _fold_into(graph: ir.Graph, conv: ir.Node, norm: ir.Node, parameters: list[np.ndarray]) -> bool:
    weight_value = constant_behind(conv.inputs[1])
    bias_value = constant_behind(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if weight_value is None or (bias_value is None and len(conv.inputs) > 2 and conv.inputs[2] is not None):
        return False
    gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters)
    attribute = norm.attributes.get("epsilon")
    factor = gamma / np.sqrt(variance + (attribute.as_float() if attribute else BATCHNORM_EPSILON))
    weight = to_numpy(weight_value)
    folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    bias = beta + ((to_numpy(bias_value) if bias_value is not None else 0.0) - mean) * factor
    weight_name, bias_name = str(weight_value.name), str(norm.inputs[2].name)  # type: ignore[union-attr]
    new_weight = add_initializer(graph, unused_name(graph, weight_name + ".folded"), folded.astype(weight.dtype))
    new_bias = add_initializer(graph, unused_name(graph, bias_name + ".folded"), bias.astype(weight.dtype))
    conv.resize_inputs(3)
    conv.replace_input_with(1, new_weight)
    conv.replace_input_with(2, new_bias)
    replaced, kept = norm.outputs[0], conv.outputs[0]
    name, was_output = replaced.name, replaced.is_graph_output()
    if was_output:
        outputs = graph.outputs
        outputs[outputs.index(replaced)] = kept
        kept.shape, kept.type = replaced.shape, replaced.type
    replaced.replace_all_uses_with(kept)
    graph.remove(norm, safe=True)
    kept.name = name
    return True


def tidy(model: ir.Model) -> bool:
    """Drop what weighs and says nothing: constant arithmetic, exporters' stack traces, shapes of inner values.

    Names, metadata of the model, inputs and outputs stay as they are.
    """
    changed = fold_constants(model)
    for node in model.graph:
        changed |= bool(node.metadata_props or node.doc_string)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in (*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    common.RemoveUnusedNodesPass()(model)
    return changed


def raise_opset(model: ir.Model, least: int, path: str) -> bool:
    """Bring the default domain to at least opset `least`. Raises ModelError when the converter cannot."""
    if model.opset_imports.get("", 1) >= least:
        return False
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        onnxscript.version_converter.convert_version(model, least, fallback=True)
    except Exception as error:  # the converters raise whatever their adapters raise
        raise ModelError(f"{path}: cannot be raised to opset {least} ({error}): export it at that opset") from error
    if model.opset_imports.get("", 1) < least:
        raise ModelError(f"{path}: cannot be raised to opset {least}: export it at that opset")
    return True


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value is, looking through Identity and Constant nodes; None where it is computed."""
    while value is not None:
        if is_constant(value):
            return value
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "Constant":
            return value if ir.convenience.get_const_tensor(value) is not None else None
        value = producer.inputs[0] if producer.op_type == "Identity" else None
    return None


def to_numpy(value: ir.Value) -> np.ndarray:
    """The array of a constant value."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError(f"{value.name} is not constant")
    return tensor.numpy()


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Register a new initializer. The name must be unused (`unused_name`)."""
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    shape, kind = ir.Shape(tensor.numpy().shape), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def unused_name(graph: ir.Graph, name: str) -> str:
    """`name`, or `name.N` with the least N that no value of the graph has."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs} | set(value_names(graph))
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    return candidate


def value_names(graph: ir.Graph) -> Iterable[str]:
    return (str(value.name) for node in graph for value in node.outputs)

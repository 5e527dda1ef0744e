"""Graph passes: an ordered, visible list, each saying whether it changed the model.

`NORMALISE` makes a private copy easy to convert (one spelling for everything, constants folded), which is never written
to a user's file. What is: `fold_constants`, `untranspose_rows`, `tidy`, `raise_opset` and, by `quantize` and `prune`,
`join_biases` and those of `folding` change the graph that a file is made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.version_converter
from onnx_ir.passes import common

from converters import batch, graphs, known_sizes, precision
from converters.errors import ModelError

Pass = Callable[[ir.Model], bool]
"""Changes the model in place and returns whether it did."""

RESIZE_MODES = 11
"""The opset from which a Resize says which pixel lies where.

Before, there was one way, but for shrinking to the nearest pixel by odd factors, which onnxruntime rounds otherwise:
such a file is refused, as is every one that answers otherwise when it is raised.
"""
FOLD_LIMIT = 1 << 26  # bytes: fold whatever is constant; the shape arithmetic of exporters is far below this


def normalise(model: ir.Model) -> list[str]:
    """Run NORMALISE on `model` in place; the names of the passes that changed it."""
    return [name for name, change in NORMALISE if change(model)]


def _shared(pass_: ir.passes.PassBase) -> Pass:
    return lambda model: bool(pass_(model).modified)


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


def fix_sizes(model: ir.Model) -> bool:
    """`known_sizes.fix_sizes`, and the arithmetic with these constants, while the image still has its type."""
    changed = known_sizes.fix_sizes(model)
    if changed:
        fold_constants(model)
    return changed


def unshare_weights(model: ir.Model) -> bool:
    """Give every operand of a weighted layer an initializer that nothing else reads, so that it is changed alone.

    Of a BatchNormalization too: exporters merge equal tensors, and those of an untrained model are all equal.
    """
    changed = False
    for node in model.graph:
        if node.op_type not in (*LAYERS, "BatchNormalization"):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and graphs.is_constant(value) and len(value.uses()) > 1:
                name = graphs.unused_name(model.graph, str(value.name))
                node.replace_input_with(index, graphs.add_initializer(model.graph, name, graphs.to_numpy(value)))
                changed = True
    return changed


def untranspose_rows(model: ir.Model) -> bool:
    """Gemm reads its rows as they are: the Transpose that `transA` stands for is a node, or undoes the one before."""
    changed = False
    for node in list(model.graph):
        rows = node.inputs[0] if node.op_type == "Gemm" and graphs.integer(node, "transA", 0) else None
        if rows is None or graphs.constant_behind(rows) is not None:
            continue
        before = rows.producer()
        turns = before is not None and before.op_type == "Transpose" and graphs.ints(before, "perm") in (None, [1, 0])
        if before is not None and turns:
            straight = before.inputs[0]
        else:
            turned = ir.node("Transpose", [rows], attributes={"perm": [1, 0]})
            turned.name = turned.outputs[0].name = graphs.unused_name(model.graph, f"{rows.name}.rows")
            turned.outputs[0].type = rows.type
            model.graph.insert_before(node, turned)
            straight = turned.outputs[0]
        node.replace_input_with(0, straight)
        node.attributes.pop("transA")
        changed = True
    if changed:
        common.RemoveUnusedNodesPass()(model)
    return changed


def join_biases(model: ir.Model, ranks_of: Callable[[list[str]], Mapping[str, int]]) -> bool:
    """A MatMul of rows whose result alone goes into the Add of a bias becomes a Gemm, as others export a Linear.

    `ranks_of` gives the ranks of named values, as far as it can. onnxruntime does the same to a quantized graph, but
    only where it knows the rank, and then leaves the product in float.
    """
    found = [(node, add) for node in model.graph if (add := _bias_behind(node)) is not None]
    ranks = ranks_of([str(node.inputs[0].name) for node, _ in found if node.inputs[0] is not None]) if found else {}
    changed = False
    for node, add in found:
        source, weight = node.inputs
        if source is None or ranks.get(str(source.name)) != ROWS:
            continue
        bias = next(value for value in add.inputs if value is not node.outputs[0])
        joined = ir.node("Gemm", [source, weight, bias], name=node.name)
        old, new = [add.outputs[0]], [joined.outputs[0]]
        ir.convenience.replace_nodes_and_values(model.graph, add, [add, node], [joined], old, new)
        changed = True
    return changed


def _bias_behind(node: ir.Node) -> ir.Node | None:
    """The Add, of one number a column, that alone reads a MatMul with a constant matrix."""
    matrix = graphs.constant_behind(node.inputs[1]) if node.op_type == "MatMul" else None
    readers = [reader for reader, _ in node.outputs[0].uses()]
    if matrix is None or node.outputs[0].is_graph_output() or [reader.op_type for reader in readers] != ["Add"]:
        return None
    bias = graphs.constant_behind(next(value for value in readers[0].inputs if value is not node.outputs[0]))
    shape = graphs.to_numpy(matrix).shape
    fits = bias is not None and len(shape) == ROWS and graphs.to_numpy(bias).shape == shape[1:]
    return readers[0] if fits and readers[0].graph is node.graph else None


ROWS = 2
"""Axes of what Gemm multiplies."""
LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators whose constant operand (MatMul: either) is the weight of a layer that can be quantized or pruned."""

NORMALISE: tuple[tuple[str, Pass], ...] = (
    ("inline functions", _shared(common.InlinePass())),
    ("initializers are not inputs", _shared(common.RemoveInitializersFromInputsPass())),
    ("dequantize constants", precision.dequantize_constants),
    ("widen few bits", precision.widen_few_bits),
    ("fold constants", fold_constants),
    ("known sizes", fix_sizes),
    ("image is float", precision.image_is_float),
    ("float32", precision.to_float32),
    ("open batch", batch.open_batch),
    ("own rows", batch.keep_rows),
    ("free reshapes", batch.free_reshapes),
    (
        "constants are initializers",
        _shared(common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
    ),
    ("remove identities", _shared(common.IdentityEliminationPass())),
    ("remove unused nodes", _shared(common.RemoveUnusedNodesPass())),
    ("rows as they are", untranspose_rows),
    ("one initializer a layer", unshare_weights),
    ("sort", _shared(common.TopologicalSortPass())),
    ("fix names", _shared(common.NameFixPass())),
)


def tidy(model: ir.Model) -> bool:
    """Drop what weighs and says nothing: constant arithmetic, exporters' stack traces, shapes of inner values.

    Names stay as they are, and all that is said of the model, its graph, inputs and outputs.
    """
    changed = fold_constants(model)
    for node in model.graph:
        changed |= bool(node.metadata_props or node.doc_string)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            if not value.is_graph_output():
                value.metadata_props.clear()
                value.shape = value.type = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    common.RemoveUnusedNodesPass()(model)
    return changed


def _outside(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.outputs]


def least_ir(model: ir.Model) -> int:
    """The IR version that the model's operator sets came with."""
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)


def raise_opset(model: ir.Model, least: int, path: str) -> bool:
    """Bring the default domain to at least opset `least`. Raises ModelError when the converter cannot."""
    if model.opset_imports.get("", 1) >= least:
        return False
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    old_resizes = model.opset_imports.get("", 1) < RESIZE_MODES
    if any(node.op_type == "GroupNormalization" for node in model.graph.all_nodes()):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)  # how many channels a group has
    said_of_graph = dict(model.graph.metadata_props)
    outside = [(value.name, dict(value.metadata_props), value.shape) for value in _outside(model)]
    try:
        onnxscript.version_converter.convert_version(model, least, fallback=True)
    except Exception as error:  # the converters raise whatever their adapters raise
        raise ModelError(f"{path}: cannot be raised to opset {least} ({error}): export it at that opset") from error
    if model.opset_imports.get("", 1) < least:
        raise ModelError(f"{path}: cannot be raised to opset {least}: export it at that opset")
    model.graph.metadata_props.update(said_of_graph)  # which onnx's own converter drops, as it does what follows
    for value, (name, said, shape) in zip(_outside(model), outside, strict=True):
        if value.name == name:
            value.metadata_props.update(said)
            value.shape = shape
    if old_resizes:  # the converters leave what Resize and Upsample meant before to a default that means something else
        for node in model.graph.all_nodes():
            if node.op_type == "Resize":
                node.attributes["coordinate_transformation_mode"] = ir.AttrString(
                    "coordinate_transformation_mode", "asymmetric"
                )
                node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    return True

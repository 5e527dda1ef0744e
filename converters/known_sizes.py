"""What a graph computes of sizes alone, asked of onnxruntime and written down.

Such values run from the image, or from an early layer, past every layer to where they are used, and a block cannot end
before that. What shape inference says of them may be wrong (pools that round up) or stale, so the numbers are those of
a run on a few black images.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from converters import graphs
from converters.errors import ModelError
from converters.runtime import Session

FEW = 3
"""Images in the run."""

SPATIAL = ("AveragePool", "Conv", "ConvTranspose", "MaxPool")
"""Operators that write images and channels [N, C, ...], and sides behind them."""


def fix_sizes(model: ir.Model) -> bool:
    """A side that is read from the shape of what a convolution or a pool writes becomes a constant.

    Exporters compute them for every input size. How many channels there are is left to be computed: pruning changes it.
    """
    sides = [node for node in model.graph if _reads_sides(node)]
    found = values_of_a_run(model, [node.outputs[0] for node in sides])
    for node in sides:
        output = node.outputs[0]
        if output in found:
            name = graphs.unused_name(model.graph, f"{output.name}.known")
            output.replace_all_uses_with(graphs.add_initializer(model.graph, name, found[output]))
    return bool(found)


def _reads_sides(node: ir.Node) -> bool:
    """Whether a node is a Gather from a Shape of what a spatial operator writes, and of its sides alone."""
    if node.op_type != "Gather" or graphs.integer(node, "axis", 0) or node.inputs[0] is None:
        return False
    shape, index = node.inputs[0].producer(), graphs.constant_behind(node.inputs[1])
    if shape is None or shape.op_type != "Shape" or shape.attributes or shape.inputs[0] is None or index is None:
        return False
    writer, sizes = shape.inputs[0].producer(), shape.inputs[0].shape
    if writer is None or writer.op_type not in SPATIAL or sizes is None or node.outputs[0].is_graph_output():
        return False
    axes = graphs.to_numpy(index).ravel() % len(sizes)
    return bool(axes.size) and bool((axes > 1).all())


def is_of_sizes(value: ir.Value, image: ir.Value) -> bool:
    """Whether a value depends on the image through its size at most, and not through what is in it."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value is image:
            return False
        node = value.producer()
        if value in seen or node is None or node.op_type in ("Shape", "Size"):
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return False  # which reads what it likes
        seen.add(value)
        waiting += [operand for operand in node.inputs if operand is not None]
    return True


def values_of_a_run(model: ir.Model, values: list[ir.Value]) -> dict[ir.Value, np.ndarray]:
    """Values of the graph for FEW black images; nothing where there are none, sides are open, or the file does not run.

    Whoever runs it says why. Open sides that a spec has fixed are not open.
    """
    image = graphs.image_input(model.graph)
    pixels = [] if image.shape is None else [side for side in list(image.shape)[1:] if isinstance(side, int)]
    if not values or len(pixels) < 3:
        return {}
    probe = model.clone()
    graphs.set_outputs(probe.graph, [str(value.name) for value in values])
    common.RemoveUnusedNodesPass()(probe)
    try:
        session = Session(probe, optimise=False)
        batch = graphs.image_input(probe.graph).shape
        count = batch[0] if batch is not None and isinstance(batch[0], int) else FEW
        found = dict(zip(session.output_names, session.run(np.zeros([count, *pixels], np.float32)), strict=True))
    except ModelError:
        return {}
    return {value: found[str(value.name)] for value in values}

"""Where a classifier's logits are: before a closing softmax, sigmoid or ArgMax, and in which of several outputs.

Exporters end a classifier in many ways: softmax, log-softmax, sigmoid, the index of the best class, several of these
at once, an embedding or an auxiliary head next to the logits. What is inverted and quantized is always the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from converters import graphs
from converters.errors import ModelError

KINDS = {"Softmax": "softmax", "LogSoftmax": "log-softmax", "Sigmoid": "sigmoid", "ArgMax": "argmax", "TopK": "top-k"}
"""Closing operators, and what the output of a model that ends in one of them is called."""

INDICES = ("argmax", "top-k")

NEUTRAL = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")
"""Operators between logits and an output that move no number to another place, or are no operation in inference."""


@dataclass(frozen=True)
class Ending:
    """The value that holds the logits, the output that comes of it, what kind that output is, and what to say of it."""

    logits: ir.Value
    output: ir.Value
    kind: str
    notes: tuple[str, ...] = ()


def find_ending(graph: ir.Graph, path: Path) -> Ending:
    """The logits of a graph. Raises ModelError where it is not an image classifier, or one with several tasks."""
    image = graphs.image_input(graph)
    outputs = [value for value in graph.outputs if image in _ancestors([value])] or list(graph.outputs)
    names = ", ".join(str(value.name) for value in outputs)
    if any(node.op_type == "NonMaxSuppression" for node in graph):
        raise ModelError(f"{path} selects boxes (NonMaxSuppression), so it is a detector: give an image classifier")
    endings = [_trace(value) for value in outputs]
    for ending in endings:
        if not _is_matrix(ending):
            several = f" ({len(outputs)} outputs: {names})" if len(outputs) > 1 else ""
            raise ModelError(
                f"{path}: output {ending.output.name} has shape {ending.output.shape}, not [batch, classes]{several}:"
                " it is not an image classifier"
            )
    distinct = {ending.logits: ending for ending in reversed(endings)}  # several outputs may come of the same logits
    heads = [ending for ending in endings if distinct[ending.logits] is ending]
    read = _ancestors([ending.logits for ending in heads])
    last = [ending for ending in heads if ending.logits not in read]  # an embedding that logits are made of is none
    if len({count for ending in last if (count := _classes(ending)) is not None}) > 1:
        raise ModelError(
            f"{path} has {len(outputs)} outputs ({names}) of unlike sizes, like a detector or a model of several tasks:"
            " a classifier has one, [batch, classes]"
        )
    chosen = last[0]
    others = [str(value.name) for value in outputs if value is not chosen.output]
    note = f"of the outputs {names}, {chosen.output.name} is taken and {', '.join(others)} left alone"
    return Ending(chosen.logits, chosen.output, chosen.kind, (note,) if others else ())


def _trace(output: ir.Value) -> Ending:
    """Walk back from an output through what only renames, to a closing operator and what that reads."""
    value, kind, logits = output, "logits", output
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type in KINDS:
            value = logits = node.inputs[0]
            kind = KINDS[node.op_type] if kind in ("logits", "softmax") else kind
        elif node.op_type in NEUTRAL:
            value = node.inputs[0]
            if kind == "logits" and logits is node.outputs[0] and node.op_type in ("Identity", "Cast"):
                logits = value  # the same numbers, before they are narrowed
        else:
            break
    return Ending(logits, output, kind)


def _is_matrix(ending: Ending) -> bool:
    """Whether an output is [batch, classes], with trailing ones perhaps, or indices of classes."""
    shape = ending.output.shape
    if shape is None:
        return True
    if ending.kind in INDICES:
        return len(shape) <= 2
    return len(shape) >= 2 and sum(size != 1 for size in list(shape)[1:]) <= 1


def _classes(ending: Ending) -> int | None:
    """How many classes an output tells apart, where its shape says so."""
    sizes = [] if ending.output.shape is None or ending.kind in INDICES else list(ending.output.shape)[1:]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if sizes and len(known) == len(sizes) else None


def _ancestors(values: Sequence[ir.Value]) -> set[ir.Value]:
    """Every value that one of `values` is computed from, themselves not counted."""
    found: set[ir.Value] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        for value in node.inputs if node is not None else ():
            if value is not None and value not in found:
                found.add(value)
                waiting.append(value.producer())
    return found

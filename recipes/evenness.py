"""Values whose channels training leaves even: of mean 0 and about one deviation, over images and places.

Two kinds are told from the graph. Where BatchNorm was folded into a convolution, its offsets and scales were mean and
deviation of what the convolution writes, and training moves them little from 0 and from one another. And what
LayerNormalization writes has one mean and one deviation at every place: the mean of a channel over all places is what
these have in common, which is little for images like those of training, and much for others, that all look alike to the
network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from converters import folding, graphs
from converters.torch_module import Step, TorchClassifier
from recipes.layer_norms import LayerNorm, layer_norms, shapes_of


@dataclass(frozen=True)
class EvenValue:
    """A value [N, C, ...] or, of tokens and of what is transposed, with its channels elsewhere."""

    name: str
    axis: int
    """That of its channels."""


def even_values(module: TorchClassifier) -> list[EvenValue]:
    """Outputs of convolutions that BatchNorm may have been folded into, and of LayerNormalization, in that order.

    What has one place in an image is left out; what BatchNorm reads, of which more is known; and that of which some
    places alone are read, as of a class token, since training did not shape the others.
    """
    norms, other = layer_norms(module), {norm.input for norm in module.batchnorms()}
    other |= {norm.output for norm in norms if _read_in_part(norm.output, module)}
    found = _folded_convolutions(module, norms)
    found += [EvenValue(norm.output, norm.axis) for norm in norms if norm.output not in other]
    shapes = shapes_of(module, [value.name for value in found])
    return [value for value in found if shapes[value.name].numel() > shapes[value.name][value.axis]]


def _read_in_part(name: str, module: TorchClassifier) -> bool:
    readers = [step.op for step in module.whole.steps if name in step.inputs]
    return bool(readers) and all(op in ("Gather", "Slice") for op in readers)


def biased_convolutions(module: TorchClassifier) -> dict[str, EvenValue]:
    """By output of each convolution that has a bias, or something added to each channel: what it then comes to."""
    values, found = graphs.values_by_name(module.classifier.normal.graph), {}
    for layer in module.layers():
        if layer.op != "Conv":
            continue
        if end := folding.shifted_end(values[layer.output], layer.shape[layer.axis], len(layer.shape)):
            found[layer.output] = EvenValue(str(end[0].name), end[1])
        elif layer.bias is not None:
            found[layer.output] = EvenValue(layer.output, 1)
    return found


def _folded_convolutions(module: TorchClassifier, norms: Iterable[LayerNorm]) -> list[EvenValue]:
    """What convolutions write that have a bias, which folding leaves, and no sign of another normalisation.

    Left out is what a BatchNorm comes after before the next weighted layer, as it was not folded; what is before or
    behind LayerNormalization with no sum of two values between, as that stands in its place; and what no weighted layer
    comes after at all, as its channels are classes.
    """
    layers = {layer.output for layer in module.layers()}
    batches = {norm.input for norm in module.batchnorms()}
    before, behind = {norm.input for norm in norms}, {norm.output for norm in norms}
    leading: set[str] = set()
    for step in module.whole.steps:
        if behind.intersection(step.inputs) and not _sums_two(step, module):
            behind.update(step.outputs)
    for step in reversed(module.whole.steps):
        weighted = step.outputs[0] in layers
        if weighted or leading.intersection(step.outputs):
            leading.update(filter(None, step.inputs))
        if not weighted and batches.intersection(step.outputs):
            batches.update(filter(None, step.inputs))
        if before.intersection(step.outputs) and not _sums_two(step, module):
            before.update(filter(None, step.inputs))
    other = batches | before | behind
    return [
        value
        for name, value in biased_convolutions(module).items()
        if name in leading and not other.intersection((name, value.name))
    ]


def _sums_two(step: Step, module: TorchClassifier) -> bool:
    return step.op in ("Add", "Sum") and sum(not module.is_constant(name) for name in step.inputs) > 1

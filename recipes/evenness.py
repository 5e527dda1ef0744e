"""Values whose channels training leaves even: of mean 0 and about one deviation, over images and places.

Two kinds are told from the graph. Where BatchNorm was folded into a convolution, its offsets and scales were mean and
deviation of what the convolution writes, and training moves them little from 0 and from one another. And what
LayerNormalization writes has one mean and one deviation at every place: the mean of a channel over all places is what
these have in common, which is little for images like those of training, and much for others, that all look alike to the
network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from converters.torch_module import Step, TorchClassifier


@dataclass(frozen=True)
class EvenValue:
    """A value [N, C, ...] or, of tokens, [N, ..., C]."""

    name: str
    axis: int
    """That of its channels: 1 or -1."""


@dataclass(frozen=True)
class LayerNorm:
    """Each place normalised over its channels: the value that is read, and what is written."""

    input: str
    output: str
    axis: int
    """That of the channels: 1 or -1."""


def even_values(module: TorchClassifier) -> list[EvenValue]:
    """Outputs of convolutions that BatchNorm may have been folded into, and of LayerNormalization, in that order.

    What has one place in an image is left out, and so are convolutions that are fewer than the others: the network is
    one of LayerNormalization, and they had no BatchNorm to lose.
    """
    norms = layer_norms(module)
    folded = [EvenValue(name, 1) for name in _folded_convolutions(module, norms)]
    normal = [EvenValue(norm.output, norm.axis) for norm in norms]
    shapes = _shapes(module, [value.name for value in (*folded, *normal)])
    folded, normal = (
        [value for value in values if shapes[value.name].numel() > shapes[value.name][value.axis]]
        for values in (folded, normal)
    )
    return normal if len(folded) < len(normal) else [*folded, *normal]


def layer_norms(module: TorchClassifier) -> list[LayerNorm]:
    """LayerNormalization over the channels alone, in order, with its scale and offset.

    Also where an exporter wrote it out, as (x - mean) / sqrt(...).
    """
    steps = module.whole.steps
    maker = {name: step for step in steps for name in step.outputs}
    reads = Counter(name for step in steps for name in step.inputs)
    reader = {name: step for step in steps for name in step.inputs if reads[name] == 1}
    means = {step.outputs[0]: mean for step in steps if (mean := _mean_taken_away(step, maker)) is not None}
    layers = [step for step in steps if step.op == "LayerNormalization"]
    shapes = _shapes(module, [*means, *(mean.outputs[0] for mean in means.values()), *(s.outputs[0] for s in layers)])
    found = {}
    for step in layers:
        rank = len(shapes[step.outputs[0]])
        if step.attributes.get("axis", -1) in (-1, rank - 1) and rank > 2:
            found[step.outputs[0]] = LayerNorm(step.inputs[0], step.outputs[0], -1)
    for output, mean in means.items():
        shape, reduced = shapes[output], shapes[mean.outputs[0]]
        axes = [axis for axis, size in enumerate(shape) if len(shape) == len(reduced) and reduced[axis] != size]
        if axes in ([1], [len(shape) - 1]) and len(shape) > 2:
            found[output] = LayerNorm(mean.inputs[0], _scaled(output, reader, module), 1 if axes == [1] else -1)
    return [found[step.outputs[0]] for step in steps if step.outputs[0] in found]


def _mean_taken_away(step: Step, maker: Mapping[str, Step]) -> Step | None:
    """The mean m of a step that divides x - m by a root."""
    if step.op != "Div" or not all(name in maker for name in step.inputs):
        return None
    difference, root = (maker[name] for name in step.inputs)
    mean = maker.get(difference.inputs[1]) if difference.op == "Sub" else None
    if root.op != "Sqrt" or mean is None or mean.op != "ReduceMean" or mean.inputs[0] != difference.inputs[0]:
        return None
    return mean


def _scaled(name: str, reader: Mapping[str, Step], module: TorchClassifier) -> str:
    """What scale and offset, if any, make of a value: constants that it is multiplied with, and added to."""
    for op in ("Mul", "Add"):
        step = reader.get(name)
        if step is not None and step.op == op and any(module.is_constant(other) for other in step.inputs):
            name = step.outputs[0]
    return name


def _folded_convolutions(module: TorchClassifier, norms: Iterable[LayerNorm]) -> list[str]:
    """Outputs of convolutions that have a bias, which folding leaves, and that no other normalisation follows.

    Left out is what a BatchNorm comes after before the next weighted layer, as it was not folded; what a
    LayerNormalization comes after, which stands in its place, unless a sum of two values lies between; and what no
    weighted layer comes after at all, as its channels are classes.
    """
    layers = {layer.output: layer for layer in module.layers()}
    batches, places = {norm.input for norm in module.batchnorms()}, {norm.input for norm in norms}
    leading: set[str] = set()
    for step in reversed(module.whole.steps):
        weighted = step.outputs[0] in layers
        if weighted or leading.intersection(step.outputs):
            leading.update(step.inputs)
        if not weighted and batches.intersection(step.outputs):
            batches.update(step.inputs)
        if not weighted and places.intersection(step.outputs) and not _sums_two(step, module):
            places.update(step.inputs)
    return [
        name
        for name, layer in layers.items()
        if layer.op == "Conv" and layer.bias is not None and name in leading and name not in batches | places
    ]


def _sums_two(step: Step, module: TorchClassifier) -> bool:
    return step.op in ("Add", "Sum") and sum(not module.is_constant(name) for name in step.inputs) > 1


@torch.no_grad()
def _shapes(module: TorchClassifier, names: Collection[str]) -> dict[str, torch.Size]:
    """Of values, by name, for one image."""
    if not names:
        return {}
    values = module.segment([module.input_name], names)({module.input_name: module.black_image()})
    return {name: value.shape for name, value in values.items()}

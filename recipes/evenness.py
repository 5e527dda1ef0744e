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

    What has one place in an image is left out; what BatchNorm reads, of which more is known; and that of which some
    places alone are read, as of a class token, since training did not shape the others.
    """
    norms, other = layer_norms(module), {norm.input for norm in module.batchnorms()}
    other |= {norm.output for norm in norms if _read_in_part(norm.output, module)}
    found = [EvenValue(name, 1) for name in _folded_convolutions(module, norms)]
    found += [EvenValue(norm.output, norm.axis) for norm in norms if norm.output not in other]
    shapes = _shapes(module, [value.name for value in found])
    return [value for value in found if shapes[value.name].numel() > shapes[value.name][value.axis]]


def _read_in_part(name: str, module: TorchClassifier) -> bool:
    readers = [step.op for step in module.whole.steps if name in step.inputs]
    return bool(readers) and all(op in ("Gather", "Slice") for op in readers)


def layer_norms(module: TorchClassifier) -> list[LayerNorm]:
    """LayerNormalization over the channels alone, in order, with its scale and offset.

    Also where an exporter wrote it out as (x - mean) / sqrt(...), if a scale for each channel follows: a norm over
    places, as of InstanceNormalization, has one for something else. Other spellings (x times a reciprocal) are missed.
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
        if axes not in ([1], [len(shape) - 1]) or len(shape) < 3:
            continue
        scaled = _scaled(output, len(shape) - 1 - axes[0], reader, module)
        if scaled is not None:
            found[output] = LayerNorm(mean.inputs[0], scaled, 1 if axes == [1] else -1)
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


def _scaled(name: str, places: int, reader: Mapping[str, Step], module: TorchClassifier) -> str | None:
    """What a scale for each channel, and an offset if there is one, make of a value; None where there is no scale.

    `places` is the number of axes behind that of the channels.
    """
    scale = reader.get(name)
    if scale is None or not _for_channels(scale, "Mul", places, module):
        return None
    offset = reader.get(scale.outputs[0])
    return (offset if offset is not None and _for_channels(offset, "Add", places, module) else scale).outputs[0]


def _for_channels(step: Step, op: str, places: int, module: TorchClassifier) -> bool:
    """Whether the other operand of a step is a constant that has a number for each channel, and for nothing else."""
    shapes = [module.constant(name).shape for name in step.inputs if module.is_constant(name)]
    return step.op == op and any(len(s) > places and s.numel() == s[-1 - places] > 1 for s in shapes)


def _folded_convolutions(module: TorchClassifier, norms: Iterable[LayerNorm]) -> list[str]:
    """Outputs of convolutions that have a bias, which folding leaves, and no sign of another normalisation.

    Left out is what a BatchNorm comes after before the next weighted layer, as it was not folded; what is before or
    behind LayerNormalization with no sum of two values between, as that stands in its place; and what no weighted layer
    comes after at all, as its channels are classes.
    """
    layers = {layer.output: layer for layer in module.layers()}
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
        name
        for name, layer in layers.items()
        if layer.op == "Conv" and layer.bias is not None and name in leading and name not in other
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

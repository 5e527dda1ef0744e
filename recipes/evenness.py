"""Values whose channels training leaves even: of mean 0 and about one deviation, over images and places.

Two kinds are told from the graph. Where BatchNorm was folded into a convolution, its offsets and scales were mean and
deviation of what the convolution writes, and training moves them little from 0 and from one another. And what
LayerNormalization writes has one mean and one deviation at every place: the mean of a channel over all places is what
these have in common, which is little for images like those of training, and much for others, that all look alike to the
network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.torch_module import Step, TorchClassifier
from recipes.images import gaussian_noise

ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Neg", "Cast", "Identity")
"""These lead from the mean to what is normalised, whatever computes the deviation."""
FARTHEST = 6
"""Steps from a mean to what is made of it at last: four (x - mean, over a root, scale, offset), and two Casts."""
LEAST_PLACES = 8
"""Of fewer, a scale and an offset for each channel explain too much."""
ALIKE, UNEVEN = 1e-2, 1e-3
"""Relative: what may be left of a value that is explained; least difference of scales."""


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
    """LayerNormalization over the channels alone, in order, with its scale and offset: the operator, or written out."""
    found = {norm.output: norm for norm in (*_by_operator(module), *_written_out(module))}
    return [found[step.outputs[0]] for step in module.whole.steps if step.outputs[0] in found]


def _by_operator(module: TorchClassifier) -> Iterator[LayerNorm]:
    steps = [step for step in module.whole.steps if step.op == "LayerNormalization"]
    shapes = _shapes(module, [step.outputs[0] for step in steps])
    for step in steps:
        rank = len(shapes[step.outputs[0]])
        if step.attributes.get("axis", -1) in (-1, rank - 1) and rank > 2:
            yield LayerNorm(step.inputs[0], step.outputs[0], -1)


def _written_out(module: TorchClassifier) -> Iterator[LayerNorm]:
    """Where elementwise steps behind the mean of x over one axis come to the LayerNormalization of x.

    Exporters spell it in many ways (over a root, times its reciprocal or a power of -0.5; x a + (b - mean a), as
    TensorFlow does), so it is told by what the steps compute: of the values that are it, the last.
    """
    steps = module.whole.steps
    makers = {name: step for step in steps for name in step.outputs}
    readers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        for name in step.inputs:
            readers[name].append(step)
    means = [step for step in steps if step.op == "ReduceMean" and step.inputs[0] in makers]
    behind = {mean.outputs[0]: _elementwise_behind(mean.outputs[0], readers) for mean in means}
    wanted = {mean.inputs[0] for mean in means} | set(behind).union(*behind.values())
    values = _of_two_images(module, wanted)
    for mean in means:
        x, reduced = values[mean.inputs[0]], values[mean.outputs[0]].shape
        axes = [axis for axis, size in enumerate(x.shape) if x.ndim == len(reduced) and reduced[axis] != size]
        if x.ndim < 3 or axes not in ([1], [x.ndim - 1]):
            continue
        normalised = [name for name in behind[mean.outputs[0]] if _is_layer_norm(values[name], x, axes[0])]
        if normalised:
            yield LayerNorm(mean.inputs[0], normalised[-1], 1 if axes == [1] else -1)


def _elementwise_behind(name: str, readers: Mapping[str, Sequence[Step]]) -> list[str]:
    """What few elementwise steps make of a value, the nearest first."""
    found, border = dict.fromkeys([name]), [name]
    for _ in range(FARTHEST):
        border = [
            output for value in border for step in readers[value] if step.op in ELEMENTWISE for output in step.outputs
        ]
        found |= dict.fromkeys(border)
    return list(found)


def _is_layer_norm(y: Tensor, x: Tensor, axis: int) -> bool:
    """Whether y is x normalised over `axis` at each place, times a scale of each channel, plus an offset of each.

    Scales that are all alike are none: without them it may be the normalisation of something else. Places that hardly
    vary are left out, as the summand under the root decides there.
    """
    if y.shape != x.shape:
        return False
    x, y = (value.double().movedim(axis, -1).flatten(0, -2) for value in (x, y))
    deviation, mean = torch.std_mean(x, 1, correction=0, keepdim=True)
    kept = (deviation > 0.1 * deviation.max()).flatten()
    if int(kept.sum()) < LEAST_PLACES:
        return False
    normal, y = ((x - mean) / deviation)[kept], y[kept]
    normal, y = normal - normal.mean(0), y - y.mean(0)
    scale = (normal * y).sum(0) / normal.square().sum(0).clamp_min(1e-12)
    uneven = float(scale.max() - scale.min()) > UNEVEN * float(scale.abs().max())
    return uneven and float((y - scale * normal).norm()) < ALIKE * float(y.norm())


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


def _shapes(module: TorchClassifier, names: Collection[str]) -> dict[str, torch.Size]:
    """Of values, by name, for one image."""
    return {name: value.shape for name, value in _values(module, names, module.black_image()).items()}


def _of_two_images(module: TorchClassifier, names: Collection[str]) -> dict[str, Tensor]:
    """Values by name, of noise and of less of it: what is one number for a whole image is none for both."""
    pixels = gaussian_noise(1, module.spec.channel_count, module.spec.size, seed=0).pixels
    first, second = (
        _values(module, names, module.spec.to_input(share * pixels).to(module.device)) for share in (1.0, 0.3)
    )
    return {name: torch.cat([torch.atleast_1d(first[name]), torch.atleast_1d(second[name])]) for name in names}


@torch.no_grad()
def _values(module: TorchClassifier, names: Collection[str], x: Tensor) -> dict[str, Tensor]:
    """By name, of model inputs."""
    return module.segment([module.input_name], names)({module.input_name: x}) if names else {}

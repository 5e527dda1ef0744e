"""LayerNormalization in a graph: the operator, and what exporters write in its place before operator set 17."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.torch_module import Step, TorchClassifier
from recipes.images import gaussian_noise

ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Sum", "Neg", "Cast", "Identity", "Unsqueeze")
"""These lead from the mean to what is normalised, whatever computes the deviation."""
FARTHEST = 6
"""Steps from a mean to what is made of it at last: four (x - mean, over a root, scale, offset), and two Casts."""
LEAST_PLACES, MOST_PLACES = 8, 512
"""Of fewer, a scale and an offset for each channel explain too much; more tell no more."""
MOST_SUMMAND = 0.1
"""Beside the variance, under the root: 1e-12 to 1e-3 are in use."""
ALIKE, UNEVEN = 1e-3, 1e-2
"""Relative: what may be left of a value that is explained; least difference of scales."""
AT_ONCE = 8
"""Means whose values are held at a time."""


@dataclass(frozen=True)
class LayerNorm:
    """Each place normalised over its channels: the value that is read, and what is written."""

    input: str
    output: str
    axis: int
    """That of the channels: 1 or -1."""


def layer_norms(module: TorchClassifier) -> list[LayerNorm]:
    """LayerNormalization over the channels alone, in order, with its scale and offset: the operator, or written out."""
    found = {norm.output: norm for norm in (*_by_operator(module), *_written_out(module))}
    return [found[step.outputs[0]] for step in module.whole.steps if step.outputs[0] in found]


def _by_operator(module: TorchClassifier) -> Iterator[LayerNorm]:
    steps = [step for step in module.whole.steps if step.op == "LayerNormalization"]
    shapes = shapes_of(module, [step.outputs[0] for step in steps])
    for step in steps:
        rank = len(shapes[step.outputs[0]])
        if step.attributes.get("axis", -1) in (-1, rank - 1) and rank > 2:
            yield LayerNorm(step.inputs[0], step.outputs[0], -1)


def _written_out(module: TorchClassifier) -> Iterator[LayerNorm]:
    """Where elementwise steps behind the mean of x over one axis come to the LayerNormalization of x.

    Exporters spell it in many ways (over a root, times its reciprocal or a power of -0.5; x a + (b - mean a), as
    TensorFlow does), so it is told by what the steps compute. A mean as a sum over a number is missed, and what has no
    scale, or the same for all channels: it may be the normalisation of something else.
    """
    readers: dict[str, list[Step]] = defaultdict(list)
    for step in module.whole.steps:
        for name in step.inputs:
            readers[name].append(step)
    means = list(_means(module, readers))
    summands = _summands(module)
    for first in range(0, len(means), AT_ONCE):
        some = means[first : first + AT_ONCE]
        values = _of_noise(module, {name for mean in some for name in (mean.input, *mean.behind)}, 2)
        for mean in some:
            x = values[mean.input]
            axis = mean.axis % x.ndim
            if x.ndim < 3 or axis not in (1, x.ndim - 1):
                continue
            if x.numel() // x.shape[axis] < LEAST_PLACES:
                values |= _of_noise(module, (mean.input, *mean.behind), 2 * LEAST_PLACES)
                x = values[mean.input]
            fits = {name: _scales(values[name], x, axis, summands) for name in mean.behind}
            end = next((name for name, scale in fits.items() if scale is not None), None)
            while end is not None and fits.get(following := _by_constants(end, readers, module)) is not None:
                end = following
            if end is not None and _uneven(fits[end]):
                yield LayerNorm(mean.input, end, 1 if axis == 1 else -1)


@dataclass(frozen=True)
class _Mean:
    """Of a computed value over one axis, and what few elementwise steps make of it, the nearest first."""

    input: str
    axis: int
    behind: tuple[str, ...]


def _means(module: TorchClassifier, readers: Mapping[str, Sequence[Step]]) -> Iterator[_Mean]:
    computed = {name for step in module.whole.steps for name in step.outputs}
    for step in module.whole.steps:
        axes = step.attributes.get("axes") or step.fixed.get(1)
        if step.op != "ReduceMean" or step.inputs[0] not in computed or not isinstance(axes, list) or len(axes) != 1:
            continue
        found, border = dict.fromkeys(step.outputs), list(step.outputs)
        for _ in range(FARTHEST):
            steps = [reader for value in border for reader in readers[value] if reader.op in ELEMENTWISE]
            border = [name for name in dict.fromkeys(reader.outputs[0] for reader in steps) if name not in found]
            found |= dict.fromkeys(border)
        if len(found) > 1:
            yield _Mean(step.inputs[0], int(axes[0]), tuple(found))


def _summands(module: TorchClassifier) -> list[float]:
    """What may stand under the root beside the variance: nothing, and small numbers that the graph adds."""
    found = [
        float(module.constant(name))
        for step in module.whole.steps
        if step.op == "Add"
        for name in step.inputs
        if module.is_constant(name) and module.constant(name).numel() == 1
    ]
    return list(dict.fromkeys([0.0, *(number for number in found if 0 < number <= MOST_SUMMAND)]))


def _scales(y: Tensor, x: Tensor, axis: int, summands: Sequence[float]) -> Tensor | None:
    """The scale of each channel [C], where y is x normalised over `axis` at each place, times it, plus an offset."""
    if y.shape != x.shape:
        return None
    x, y = (value.movedim(axis, -1).flatten(0, -2) for value in (x, y))
    few = slice(None, None, max(1, len(x) // MOST_PLACES))
    x, y = x[few].double(), y[few].double()
    y = y - y.mean(0)
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    for summand in summands:
        normal = (x - mean) / (variance + summand).sqrt().clamp_min(1e-12)
        normal = normal - normal.mean(0)
        scale = (normal * y).sum(0) / normal.square().sum(0).clamp_min(1e-12)
        if float((y - scale * normal).norm()) < ALIKE * float(y.norm()):
            return scale
    return None


def _uneven(scale: Tensor | None) -> bool:
    return scale is not None and float(scale.max() - scale.min()) > UNEVEN * float(scale.abs().max())


def _by_constants(name: str, readers: Mapping[str, Sequence[Step]], module: TorchClassifier) -> str:
    """What the only step that reads a value makes of it, if of it alone; else nothing."""
    steps = readers[name]
    alone = len(steps) == 1 and all(other == name or module.is_constant(other) for other in steps[0].inputs)
    return steps[0].outputs[0] if alone else ""


def shapes_of(module: TorchClassifier, names: Collection[str]) -> dict[str, torch.Size]:
    """Of values, by name, of one image."""
    return {name: value.shape for name, value in _values(module, names, module.black_image()).items()}


def _of_noise(module: TorchClassifier, names: Collection[str], count: int) -> dict[str, Tensor]:
    """Values by name, of so many images of less and less noise: what is one number for each image differs."""
    pixels = gaussian_noise(count, module.spec.channel_count, module.spec.size, seed=0).pixels
    images = [share * image[None] for share, image in zip(torch.linspace(1, 0.3, count), pixels, strict=True)]
    found = [_values(module, names, module.spec.to_input(image).to(module.device)) for image in images]
    return {name: torch.cat([torch.atleast_1d(values[name]) for values in found]) for name in names}


@torch.no_grad()
def _values(module: TorchClassifier, names: Collection[str], x: Tensor) -> dict[str, Tensor]:
    """By name, of model inputs."""
    return module.segment([module.input_name], names)({module.input_name: x}) if names else {}

"""The one reconstruction loop: make a block with changed weights answer as the float block does.

For a block with float inputs x and float output y, and inputs x~ that come through the blocks already changed,

    minimise over theta   objective(block(x~; theta) - y)  +  sum_l penalty_l(theta, t)

where the objective (`recipes/objective.py`) is relative to the block's error with nearest rounding, so that one penalty
weight serves all blocks, and t in [0, 1] is the share of steps done. What theta is, a rounding, a mask, a step size, is
the `Change`'s business.
Elementwise mixing of x into x~ is QDrop's (Wei et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from converters.torch_module import Segment, TorchClassifier, Transform
from recipes.blocks import Block, find_blocks
from recipes.devices import computing_in, pick
from recipes.memory import rows_like
from recipes.objective import BlockError, Objective
from recipes.settings import LoopSettings

Values = Mapping[str, Tensor]
"""By name, for all images [N, ...] or some of them."""


@dataclass(frozen=True)
class Group:
    """Trainable tensors with one learning rate; `decay` lets it fall to zero along a half cosine."""

    tensors: Sequence[Tensor]
    rate: float
    decay: bool = False


class Change(Protocol):
    """A changed tensor of a block (an initializer's replacement or a value's transform)."""

    def groups(self) -> list[Group]:
        """What to train."""
        ...

    def penalty(self, progress: float) -> Tensor | None:
        """A term to add to the loss at `progress` in [0, 1], or None."""
        ...


class ChangedWeight(Change, Protocol):
    """A replacement for an initializer."""

    def tensor(self) -> Tensor:
        """The tensor to compute with, in the initializer's layout."""
        ...


class ChangedValue(Change, Protocol):
    """A transform of a value."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FrozenValue:
    """A transform of a value that is not trained any more."""

    value: ChangedValue

    def __call__(self, x: Tensor) -> Tensor:
        return self.value(x)

    def groups(self) -> list[Group]:
        return []

    def penalty(self, progress: float) -> Tensor | None:
        return None


class LearnedTensor:
    """A float initializer that is trained along, at `rate`."""

    def __init__(self, value: Tensor, rate: float) -> None:
        self.value, self.rate = value.clone(), rate

    @classmethod
    def bias(cls, value: Tensor, rate: float) -> LearnedTensor:
        """A layer's bias [C], at `rate` relative to its typical size."""
        return cls(value, rate * (float(value.abs().mean()) + 1e-3))

    def groups(self) -> list[Group]:
        return [Group([self.value], self.rate, decay=True)] if self.rate else []

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def tensor(self) -> Tensor:
        return self.value

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.value = state["value"].to(self.value.device)


def learned_biases(module: TorchClassifier, rate: float) -> dict[str, LearnedTensor]:
    """The biases of all layers, by name, each to be trained at `rate` relative to its typical size."""
    return {
        layer.bias: LearnedTensor.bias(module.constant(layer.bias), rate)
        for layer in module.layers()
        if layer.bias is not None
    }


class Changed(TypedDict):
    """Keyword arguments that make a segment compute otherwise."""

    parameters: Mapping[str, Tensor]
    transforms: Mapping[str, Transform]


@dataclass(frozen=True)
class Changes:
    """All changes made to a model so far: tensors by initializer name, in any number of tables; transforms by value."""

    tensors: Sequence[Mapping[str, ChangedWeight]]
    values: Mapping[str, ChangedValue]

    def of(self, segment: Segment) -> Changed:
        """What `segment` is run with to compute as the changed model does."""
        parameters = {
            name: table[name].tensor() for table in self.tensors for name in segment.constants if name in table
        }
        return {"parameters": parameters, "transforms": self.values}


@dataclass
class Stretch:
    """A block on its way: its inputs [N, ...] on the two streams, `target` its float output.

    `beside` are the float values that blocks after it read, other than its output.
    """

    block: Block
    segment: Segment
    float_inputs: Values
    changed_inputs: Values
    target: Tensor
    beside: Values

    def release(self) -> None:
        """Let go of the tensors: loops hold a stretch until they have the next, and these are large."""
        self.float_inputs = self.changed_inputs = self.beside = {}
        self.target = torch.empty(0)


def walk_blocks(module: TorchClassifier, inputs: Tensor, changes: Changes, settings: LoopSettings) -> Iterator[Stretch]:
    """Block after block from `inputs` [N, ...] to the logits: the float stream and the stream through what is changed.

    What the caller changes in a block until it asks for the next is in the changed stream from there on.
    """
    floats = changed = {module.input_name: inputs}
    blocks = find_blocks(module, settings.max_chain)
    for number, block in enumerate(blocks, 1):
        segment = module.segment(block.inputs, [block.output])
        target = run_batched(segment, floats, settings.small_batch, settings.cache_limit)
        later = blocks[number:]
        beside = read_by(later, floats)
        stretch = Stretch(block, segment, read_by([block], floats), read_by([block], changed), target, beside)
        yield stretch
        stretch.release()
        floats = beside | {block.output: target}
        how = changes.of(segment)
        made = run_batched(segment, changed, settings.batch, settings.cache_limit, **how)
        changed = read_by(later, changed) | {block.output: made}


def read_by(blocks: Iterable[Block], values: Values) -> dict[str, Tensor]:
    """Those of the values that any of the blocks reads from before it."""
    names = {name for block in blocks for name in block.inputs}
    return {name: value for name, value in values.items() if name in names}


@dataclass(frozen=True)
class Loop:
    """How to train: steps, minibatch, share of inputs from the float stream (QDrop), a factor on all rates, precision.

    The block computes in `precision`; the loss and what is trained are float32 all the same.
    """

    steps: int
    batch: int
    input_drop: float = 0.0
    rate: float = 1.0
    precision: torch.dtype = torch.float32


class DropMasks:
    """Elementwise Bernoulli masks at a small cost: windows, at random places, into a pool that is drawn once.

    Drawing a fresh number for each element of a large activation takes longer than computing with it.
    """

    SLACK = 1 << 16

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self.share, self.generator = share, generator
        self._pool = torch.empty(0)

    def like(self, x: Tensor) -> Tensor:
        """A mask of x's shape, type and memory order: 1 for about `share` of the elements, and else 0."""
        if len(self._pool) < x.numel() + self.SLACK:
            draws = torch.rand(x.numel() + self.SLACK, generator=self.generator)
            self._pool = (draws < self.share).to(x)
        start = int(torch.randint(len(self._pool) - x.numel(), (1,), generator=self.generator))
        window = self._pool[start : start + x.numel()]
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            count, channels, height, width = x.shape
            return window.view(count, height, width, channels).permute(0, 3, 1, 2)
        return window.view(x.shape)


@dataclass(frozen=True)
class Reconstruction:
    """Mean squared error of the block's output before and after, relative to the output's mean square."""

    before: float
    after: float


def batches(
    segment: Segment,
    values: Values,
    batch: int,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    transforms: Mapping[str, Transform] | None = None,
) -> Iterator[Tensor]:
    """The segment's only output for `values` [N, ...], its inputs among them; by batches, the last partial one too."""
    for parts in zip(*(values[name].split(batch) for name in segment.inputs), strict=True):
        with torch.no_grad():  # left before it is yielded: of two that take turns, each would undo the other's
            given = {name: part.to(segment.owner.device) for name, part in zip(segment.inputs, parts, strict=True)}
            found = segment(given, parameters, transforms)[segment.outputs[0]]
        yield found


def run_batched(
    segment: Segment,
    values: Values,
    batch: int,
    limit: float = math.inf,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    transforms: Mapping[str, Transform] | None = None,
) -> Tensor:
    """The segment's only output for all of `values` [N, ...]; on disk where it takes more than `limit` gigabytes."""
    found, start = None, 0
    for part in batches(segment, values, batch, parameters=parameters, transforms=transforms):
        found = rows_like(part, rows_of(values), limit) if found is None else found
        found[start : start + len(part)] = part
        start += len(part)
    assert found is not None
    return found


def rows_of(values: Values) -> int:
    """N, the images that there are values [N, ...] of."""
    return len(next(iter(values.values())))


def reconstruct(
    segment: Segment,
    float_inputs: Values,
    changed_inputs: Values,
    objective: Objective,
    weights: Mapping[str, ChangedWeight],
    values: Mapping[str, ChangedValue],
    loop: Loop,
    plain: BlockError,
    generator: torch.Generator,
    advance: Callable[[int, float], None] = lambda steps, loss: None,
) -> None:
    """Train the changes of one block in place.

    `float_inputs` and `changed_inputs` [N, ...] are the block's inputs on both streams, `objective` what it is to
    answer; `weights` and `values` are its changes by initializer and value name. `plain` is the block's error with the
    changes made the plain way (`block_error` before they learn); `advance` is told steps done and loss.
    """
    changes: list[Change] = [*weights.values(), *values.values()]
    groups = [group for change in changes for group in change.groups() if group.tensors]
    if not groups or loop.steps == 0:
        advance(loop.steps, math.nan)
        return
    for group in groups:
        for tensor in group.tensors:
            tensor.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": list(group.tensors), "lr": group.rate} for group in groups])
    device = segment.owner.device
    order = torch.empty(0, dtype=torch.long)
    masks = DropMasks(loop.input_drop, generator)
    for step in range(loop.steps):
        progress = step / loop.steps
        for entry, group in zip(optimizer.param_groups, groups, strict=True):
            entry["lr"] = loop.rate * group.rate * (0.5 * (1 + math.cos(math.pi * progress)) if group.decay else 1)
        if not len(order):
            order = torch.randperm(rows_of(changed_inputs), generator=generator)
        chosen, order = order[: loop.batch], order[loop.batch :]
        given = {}
        for name in segment.inputs:
            x = pick(changed_inputs[name], chosen, device)
            if loop.input_drop:
                x = torch.lerp(x, pick(float_inputs[name], chosen, device), masks.like(x))
            given[name] = x
        parameters = {n: w.tensor() for n, w in weights.items()}
        with computing_in(loop.precision, device):
            y = segment(given, parameters, values)[segment.outputs[0]]
        loss = objective.loss(y.to(objective.target.dtype), chosen, plain)
        for change in changes:
            penalty = change.penalty(progress)
            loss = loss if penalty is None else loss + penalty
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        advance(1, float(loss.detach()) if step % 16 == 0 else math.nan)
    for group in groups:
        for tensor in group.tensors:
            tensor.requires_grad_(False)


def block_error(
    segment: Segment,
    inputs: Values,
    objective: Objective,
    weights: Mapping[str, ChangedWeight],
    values: Mapping[str, ChangedValue],
    batch: int,
) -> BlockError:
    """The error of the block's output for `inputs` [N, ...] with its changes as they are."""
    with torch.no_grad():
        parameters = {name: weight.tensor() for name, weight in weights.items()}
    return objective.error(batches(segment, inputs, batch, parameters=parameters, transforms=values), batch)

"""Reconstruction blocks, found from the graph alone.

A value is a *cut* when every path from the image to the logits goes through it. Between two neighbouring cuts lies
either one node, or a stretch with branches: a residual, inverted-residual, dense or squeeze-excite unit, whatever its
class was called. Blocks are such stretches; nodes without weights join the block before them, and runs of single
layers are joined up to `max_chain`, as in an inverted residual without a shortcut.

Some networks have hardly a cut: each cell of a NASNet reads the two before it, a CrossViT has two streams from end to
end, every layer of a DenseNet reads all before it. A stretch of more than MOST_LAYERS is divided where one value alone
is new; what is older is handed past the block, to those that read it. Only values with a row for each image are handed
over: sizes, and windows of attention, are computed from them anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from converters.torch_module import Layer, Step, TorchClassifier

MOST_LAYERS = 10
"""In a stretch that is a block as it is: an Inception module has ten."""
Live = tuple[str, ...]
"""Values that are there and still read, the oldest first."""


@dataclass(frozen=True)
class Block:
    """What computes the value `output` from the values `inputs`, all that it reads of what is there before it."""

    inputs: tuple[str, ...]
    output: str
    layers: tuple[Layer, ...]
    branches: bool

    @property
    def name(self) -> str:
        if len(self.layers) < 2:
            return self.layers[0].name if self.layers else self.output
        return f"{self.layers[0].name} to {self.layers[-1].name}"


def live_values(steps: Sequence[Step], input_name: str, output_name: str) -> list[Live]:
    """What is there and still read before each step, and after the last."""
    last_read = {name: index for index, step in enumerate(steps) for name in step.inputs}
    last_read[output_name] = len(steps)
    live: Live = (input_name,)
    found = [live]
    for index, step in enumerate(steps):
        live = tuple(name for name in (*live, *step.outputs) if last_read.get(name, -1) > index)
        found.append(live)
    return found


def find_cuts(module: TorchClassifier, live: Sequence[Live]) -> list[int]:
    """Numbers of steps after which one value alone is live, with a row for each image, from the input to the output."""
    ends = (0, len(live) - 1)
    alone = [index for index, values in enumerate(live) if len(values) == 1]
    return [index for index in alone if index in ends or live[index][0] in module.with_rows]


def find_blocks(module: TorchClassifier, max_chain: int = 3) -> list[Block]:
    """Blocks that tile the way from the image to the logits, in order.

    Each has at least one weighted layer, but for some of a stretch that was divided.
    """
    steps = module.whole.steps
    layers = {layer.output: layer for layer in module.layers()}
    inside = [[layers[name] for name in step.outputs if name in layers] for step in steps]
    live = live_values(steps, module.input_name, module.logits_name)
    blocks: list[Block] = []
    for start, end in itertools.pairwise(_without_beginnings(find_cuts(module, live), inside)):
        found = tuple(itertools.chain(*inside[start:end]))
        weighted = next((index for index in range(start, end) if inside[index]), end)
        branches = any(len(values) > 1 for values in live[weighted:end])
        after = live[end][0]
        if not found:
            blocks[-1:] = [replace(block, output=after) for block in blocks[-1:]]
        elif not branches and blocks and not blocks[-1].branches and len(blocks[-1].layers) + len(found) <= max_chain:
            blocks[-1] = replace(blocks[-1], output=after, layers=blocks[-1].layers + found)
        elif len(found) <= MOST_LAYERS:
            blocks.append(Block(live[start], after, found, branches))
        else:
            blocks += _divided(module, live, inside, (start, end), max_chain)
    return blocks


def _without_beginnings(cuts: list[int], inside: Sequence[Sequence[Layer]]) -> list[int]:
    """The cuts but for those between the input and the first layer: what has no weight there is of the first block."""
    first = next((index for index, layers in enumerate(inside) if layers), 0)
    return [cuts[0], *(cut for cut in cuts[1:] if cut > first)]


def _divided(
    module: TorchClassifier,
    live: Sequence[Live],
    inside: Sequence[Sequence[Layer]],
    stretch: tuple[int, int],
    max_chain: int,
) -> list[Block]:
    """The stretch between two cuts as several blocks."""
    held = _held(module, live, inside)
    held[stretch[1]] = live[stretch[1]]  # which may be the logits, whatever they hold
    blocks = []
    for first, last in itertools.pairwise(divide(held, [len(layers) for layers in inside], stretch, max_chain)):
        before, after = held[first], held[last]
        assert before is not None
        assert after is not None
        steps = module.segment(before, after[-1:]).steps
        read = {name for step in steps for name in step.inputs}
        inputs = tuple(name for name in before if name in read)
        blocks.append(Block(inputs, after[-1], tuple(itertools.chain(*inside[first:last])), True))
    return blocks


def divide(held: Sequence[Live | None], sizes: Sequence[int], stretch: tuple[int, int], max_chain: int) -> list[int]:
    """Numbers of steps from one end of the stretch to the other, between any two of which one value is new.

    `held` are the values to hand over after so many steps, None where that cannot be; `sizes` are layers by step. What
    is least, of all ways, is the sum of the values handed over beyond one, and of the layers of each piece beyond
    `max_chain`, squared.
    """
    start, end = stretch
    born: dict[str, int] = {}
    for index in range(start, end + 1):
        for name in held[index] or ():
            born.setdefault(name, index)
    layers = [0, *itertools.accumulate(sizes)]
    best = {start: (0, start)}
    for index in range(start + 1, end + 1):
        values = held[index]
        if not values:
            continue
        *others, newest = (born[name] for name in values)
        before = [other for other in range(max([start, *others]), newest) if other in best]
        if before:
            excess = {other: max(0, layers[index] - layers[other] - max_chain) for other in before}
            cost, other = min((best[other][0] + excess[other] ** 2, other) for other in before)
            best[index] = (cost + len(values) - 1, other)
    borders = [end]
    while borders[-1] != start:
        borders.append(best[borders[-1]][1])
    return borders[::-1]


def _held(module: TorchClassifier, live: Sequence[Live], inside: Sequence[Sequence[Layer]]) -> list[Live | None]:
    """What has to be handed over after so many steps, all with a row for each image, the oldest first.

    What has none is computed anew from what has; None where that would take a layer.
    """
    steps = module.whole.steps
    origins: dict[str, frozenset[str] | None] = {module.input_name: frozenset([module.input_name])}
    for step, layers in zip(steps, inside, strict=True):
        of_inputs = [origins[name] for name in step.inputs if name in origins]
        known = [names for names in of_inputs if names is not None]
        anew = None if layers or len(known) < len(of_inputs) else frozenset().union(*known)
        origins.update({name: frozenset([name]) if name in module.with_rows else anew for name in step.outputs})
    age = {name: index for index, name in enumerate(origins)}
    found: list[Live | None] = []
    for values in live:
        of_values = [origins[name] for name in values]
        needed = {name for names in of_values if names is not None for name in names}
        found.append(None if None in of_values else tuple(sorted(needed, key=age.__getitem__)))
    return found

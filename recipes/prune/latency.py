"""Which channels to remove, so that a share of the model's time is left.

Multiplications tell little of time: a runtime computes in blocks, and copies what does not fit them. So the files are
timed themselves, in onnxruntime and on this machine, before anything is trained: what channels a file has decides how
long it takes, and not what its weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from converters import writeback
from converters.channel_cuts import Channels
from converters.errors import MixMixError
from converters.runtime import Session, time_in_turn
from converters.torch_module import TorchClassifier
from recipes.progress import Progress
from recipes.prune.channels import Floats, Limits, Numbers, Removed, kept_anyway, removals, way_to_less

UNIT = "macs"
"""What channels are removed for, until there is little enough of the time left."""


class _Clock:
    """Times what is left of a model beside the whole of it."""

    def __init__(self, module: TorchClassifier, channels: Channels, inputs: Tensor) -> None:
        self.module, self.channels = module, channels
        self.prepared = module.classifier
        self.whole = Session(self.prepared.original, name=str(self.prepared.path))
        self.batch: NDArray[Any] = inputs[: self.prepared.fixed_batch or 1].cpu().contiguous().numpy()

    def share(self, removed: Removed) -> float:
        """The share of the whole model's time that the model takes without some channels."""
        edits = self.channels.edits(removed.numbers, {}, self.module.constant)
        narrower = Session(writeback.apply(self.prepared.original, edits), name=str(self.prepared.path))
        whole, left = time_in_turn((self.whole, narrower), self.batch)
        return left / whole


def choose_by_latency(
    module: TorchClassifier,
    channels: Channels,
    harm: Floats,
    inputs: Tensor,
    latency: float,
    limits: Limits,
    progress: Progress,
) -> Numbers:
    """The channel numbers to remove so that `latency` of the model's time is left, one batch at a time.

    Of the removals by harm (`removals`), the first that is fast enough, found by halving. Raises MixMixError where the
    narrowest is not.
    """
    clock, steps = _Clock(module, channels, inputs), list(removals(channels, harm, UNIT, limits))
    with progress.task("timing narrower models", 1 + math.ceil(math.log2(len(steps)))) as task:

        def share(removed: Removed) -> float:
            taken = clock.share(removed)
            task.advance()
            return taken

        least = share(steps[-1])
        if len(steps) == 1 or least > latency:
            raise MixMixError(
                f"{module.classifier.path} takes {least:.0%} of its time here where {kept_anyway(limits)}, and"
                f" --latency {latency:g} is less: ask for more of it{way_to_less(limits)}"
            )
        return first_within(steps[1:], latency, share).numbers


def first_within(steps: Sequence[Removed], limit: float, share: Callable[[Removed], float]) -> Removed:
    """The first of ever faster `steps` whose `share` is within the limit, found by halving; the last one is."""
    slow, fast = -1, len(steps) - 1
    while fast - slow > 1:
        middle = (fast + slow) // 2
        slow, fast = (slow, middle) if share(steps[middle]) <= limit else (middle, fast)
    return steps[fast]

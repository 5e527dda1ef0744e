"""Which channels to remove, so that a share of the model's time is left.

Multiplications tell little of time: a runtime computes in blocks, and copies what does not fit them. So the files are
timed themselves, in onnxruntime and on this machine, before anything is trained: what channels a file has decides how
long it takes, and not what its weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from converters.channel_cuts import Channels
from converters.edits import apply_edits
from converters.errors import MixMixError
from converters.runtime import Session, time_in_turn
from converters.torch_module import TorchClassifier
from recipes.images import ImageSet
from recipes.progress import Progress
from recipes.prune.channels import Floats, Limits, Numbers, Removed, kept_anyway, no_harm, removals, way_to_less
from recipes.prune.goal import MACS
from recipes.workpiece import model_inputs

UNIT = MACS
"""What channels are removed for, until there is little enough of the time left."""
NOISE = 1.1
"""Times a budget that the narrowest file may take before it is known which channels go, and still be tried."""

Share = Callable[[Removed], float]
"""The share of the whole model's time that it takes without some channels."""


def clock(module: TorchClassifier, channels: Channels) -> Share:
    """Times what is left of a model beside the whole of it, on one image or the batch that the file is fixed to."""
    prepared = module.classifier
    pixels = torch.rand(
        prepared.fixed_batch or 1,
        module.spec.channel_count,
        *module.spec.size,
        generator=torch.Generator().manual_seed(0),
    )
    batch = model_inputs(module, ImageSet(pixels)).cpu().contiguous().numpy()
    whole = Session(prepared.original, name=str(prepared.path), rests=True)

    def share(removed: Removed) -> float:
        edits = channels.edits(removed.numbers, {}, module.constant)
        model = apply_edits(prepared.original, edits)
        of_whole, left = time_in_turn((whole, Session(model, name=str(prepared.path), rests=True)), batch)
        return left / of_whole

    return share


def check_latency(module: TorchClassifier, channels: Channels, latency: float, limits: Limits) -> None:
    """Raise MixMixError where not even the narrowest file takes so little, whichever channels it has."""
    _require(
        module, list(removals(channels, no_harm(channels), UNIT, limits)), latency, limits, clock(module, channels)
    )


def choose_by_latency(
    module: TorchClassifier,
    channels: Channels,
    harm: Floats,
    latency: float,
    limits: Limits,
    progress: Progress,
    share: Share | None = None,
) -> Numbers:
    """The channel numbers to remove so that `latency` of the model's time is left, by `share` or the clock.

    Of the removals by harm (`removals`), one that is fast enough where the one before was not. Raises MixMixError
    where the narrowest is not fast enough.
    """
    steps, measure = list(removals(channels, harm, UNIT, limits)), share or clock(module, channels)
    with progress.task("timing narrower models", 2 + math.ceil(math.log2(len(steps)))) as task:

        def timed(removed: Removed) -> float:
            taken = measure(removed)
            task.advance()
            return taken

        _require(module, steps, latency, limits, timed)
        return fast_enough(steps[1:], latency, timed).numbers


MOST_ASKED = 0.99
"""The largest share, of two digits, that may be asked for."""


def _require(module: TorchClassifier, steps: Sequence[Removed], latency: float, limits: Limits, share: Share) -> None:
    """Raise MixMixError where the last of ever narrower steps takes clearly more than `latency`."""
    path = module.classifier.path
    if len(steps) == 1:
        raise MixMixError(f"{path} has no channels that can be removed, as {kept_anyway(limits)}{way_to_less(limits)}")
    least = share(steps[-1])
    if least > MOST_ASKED:
        raise MixMixError(
            f"{path} gets no faster here without channels (as {kept_anyway(limits)}, the narrowest takes {least:.1%} of"
            " its time): give --macs or --sparsity instead"
        )
    if least > NOISE * latency:
        raise MixMixError(
            f"{path} takes {least:.1%} of its time here at the least, as {kept_anyway(limits)}: give --latency"
            f" {math.ceil(100 * least) / 100:g} or more{way_to_less(limits)}"
        )


def fast_enough(steps: Sequence[Removed], limit: float, share: Share) -> Removed:
    """One of ever narrower `steps` whose `share` is within the limit, found by halving; the last one if need be.

    Where time falls with every step it is the first. It is timed once more, as a single time may be chance, and the
    next one is taken where it was.
    """
    slow, fast = -1, len(steps) - 1
    while fast - slow > 1:
        middle = (fast + slow) // 2
        slow, fast = (slow, middle) if share(steps[middle]) <= limit else (middle, fast)
    while fast < len(steps) - 1 and share(steps[fast]) > limit:
        fast += 1
    return steps[fast]

"""Noise by layer: how far every layer's output in a given file is from the reference's, in dB.

SNR = 10 log10(sum of y^2 / sum of (y' - y)^2) over images and positions, y the reference's value and y' the
candidate's. As the file runs, y' carries the noise of all layers before it; on its own, a layer reads the reference's
input (and quantizes it, where the file does), so that y' carries only what this layer adds. The latter says which
layers hurt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.classifier import Classifier
from converters.layer_values import LayerValue, Scales, Tap, layers_on_their_own, read_layers
from converters.units import Units

IMAGES = 64
"""At most this many are run: a ratio of sums over all positions needs no more."""
STEP = 4
"""Images at once where files take any number; all layers' outputs of so many are in memory together."""
LEAST_POWER = 1e-300  # a value that is zero everywhere has no ratio

Arrays = dict[str, NDArray[np.generic]]
Inputs = Callable[[Classifier, int, int], NDArray[np.float32]]
"""Images `start` to `stop` as a model takes them."""


@dataclass(frozen=True)
class LayerNoise:
    """One layer of a candidate; SNRs in dB, infinite where nothing differs and -infinite where it is not finite.

    `name` is what users know the layer by, `value` its output in the candidate, `scale` and `act_scale` the smallest
    and the largest scale of its weight and of its input where they are integers, `compared` the reference's value that
    it is held against. `snr` is None where there is none to compare, `own_snr` (the layer on the reference's input)
    also where that input is not known.
    """

    name: str
    value: str
    op: str
    snr: float | None
    own_snr: float | None
    bits: int | None
    act_bits: int | None
    scale: Scales | None
    act_scale: Scales | None
    sparsity: float
    container: str
    compared: str | None
    reason: str | None
    """Why `snr` is no number."""


def ratio(signal: float, noise: float) -> float:
    """Signal-to-noise ratio in dB of two sums of squares; infinite without noise, -infinite where it is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, LEAST_POWER) / noise)


class Sums:
    """Sums of squares of a value and of what differs from it, by layer."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self.misfits: dict[str, str] = {}
        """Layers whose values have other shapes."""

    def add(self, layer: LayerValue, expected: NDArray[np.generic], actual: NDArray[np.generic]) -> None:
        if expected.shape != actual.shape and not _same_but_flat(expected, actual):
            reason = f"its shape is {list(actual.shape)}, in the reference {list(expected.shape)}"
            self.misfits.setdefault(layer.value, reason)
            return
        y = expected.astype(np.float64).ravel()
        difference = actual.astype(np.float64).ravel() - y
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.array([y @ y, difference @ difference])
        self._sums[layer.value] = self._sums.get(layer.value, np.zeros(2)) + sums

    def snr(self, layer: LayerValue) -> float | None:
        sums = None if layer.value in self.misfits else self._sums.get(layer.value)
        return None if sums is None else ratio(float(sums[0]), float(sums[1]))


def _same_but_flat(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    """Whether two shapes [N, ...] are one but for sides of 1 or for a Flatten, which move no number."""
    return one.size == other.size and (
        [side for side in one.shape if side != 1] == [side for side in other.shape if side != 1]
        or (min(one.ndim, other.ndim) == 2 and one.shape[:1] == other.shape[:1])
    )


def measure_layers(
    reference: Classifier, candidate: Classifier, inputs: Inputs, count: int, *, threads: int = 0
) -> list[LayerNoise]:
    """Every layer of `candidate`, those that hurt most first; `count` is how many images `inputs` has."""
    layers = read_layers(candidate, reference)
    paired = [layer for layer in layers if layer.measured is not None]
    running, alone = Sums(), Sums()
    if paired:
        _run(reference, candidate, paired, inputs, count, threads, running, alone)
    measured = [_account(layer, running, alone) for layer in layers]
    return sorted(measured, key=_harm)


def _harm(layer: LayerNoise) -> tuple[bool, float]:
    """The least SNR first, on its own where that is known; what cannot be compared last."""
    snr = layer.own_snr if layer.own_snr is not None else layer.snr
    return snr is None, snr if snr is not None else 0.0


def _account(layer: LayerValue, running: Sums, alone: Sums) -> LayerNoise:
    snr = running.snr(layer)
    reason = None
    if layer.reference is None:
        reason = "the reference has no value of its name, nor of what follows it"
    elif snr is None:
        reason = running.misfits[layer.value]
    elif not math.isfinite(snr):
        reason = "equal to the reference" if snr > 0 else "infinite or no numbers"
    return LayerNoise(
        name=layer.name,
        value=layer.value,
        op=layer.op,
        snr=snr,
        own_snr=alone.snr(layer),
        bits=layer.bits,
        act_bits=layer.act_bits,
        scale=layer.scale,
        act_scale=layer.act_scale,
        sparsity=layer.sparsity,
        container=layer.container,
        compared=layer.reference,
        reason=reason,
    )


def _run(
    reference: Classifier,
    candidate: Classifier,
    layers: list[LayerValue],
    inputs: Inputs,
    count: int,
    threads: int,
    running: Sums,
    alone: Sums,
) -> None:
    """Run both models, and the candidate's layers on the reference's inputs, and add up squares."""
    origins = dict(layer.reads for layer in layers if layer.reads is not None)
    expected_names = [layer.reference for layer in layers if layer.reference is not None]
    actual_names = [layer.measured for layer in layers if layer.measured is not None]
    expected_tap = Tap(reference, [*expected_names, *origins.values()], threads=threads)
    actual_tap = Tap(candidate, actual_names, threads=threads)
    units = Units(reference), Units(candidate)
    alone_tap: Tap | None = None
    for number, (start, stop, size) in enumerate(_chunks(reference, candidate, min(count, IMAGES))):
        batches = [model.fixed_batch or size for model in (reference, candidate)]
        images = [_filled(inputs(model, start, stop), size) for model in (reference, candidate)]
        expected = units[0].original(expected_tap.run(images[0], batches[0]))
        _add(running, layers, expected, units[1].original(actual_tap.run(images[1], batches[1])))
        if number == 0:
            there = Tap(candidate, origins, threads=threads).run(images[1], batches[1]) if origins else {}
            fed = {name: there[name].dtype for name, other in origins.items() if _fits(there[name], expected[other])}
            on_their_own = layers_on_their_own(candidate, fed)
            apart = [layer for layer in layers if layer.value in on_their_own]
            names = [layer.measured for layer in apart if layer.measured is not None]
            alone_tap = Tap(candidate, names, fed, threads=threads) if apart else None
        if alone_tap is not None:
            feeds = {name: units[1].own(name, expected[origins[name]]) for name in fed}
            _add(alone, apart, expected, units[1].original(alone_tap.run(images[1], batches[1], feeds)))


def _fits(there: NDArray[np.generic], given: NDArray[np.generic]) -> bool:
    return there.shape == given.shape and there.dtype.kind == given.dtype.kind == "f"


def _add(sums: Sums, layers: list[LayerValue], expected: Arrays, actual: Arrays) -> None:
    for layer in layers:
        if layer.reference is not None and layer.measured is not None:
            sums.add(layer, expected[layer.reference], actual[layer.measured])


def _chunks(reference: Classifier, candidate: Classifier, count: int) -> Iterator[tuple[int, int, int]]:
    """Images from `start` to `stop`, and how many to make of them: whole batches where a file insists on a size."""
    fixed = max(reference.fixed_batch or 0, candidate.fixed_batch or 0)
    if not fixed:
        yield from ((start, min(start + STEP, count), min(STEP, count - start)) for start in range(0, count, STEP))
        return
    for start in range(0, max(1, count // fixed) * fixed, fixed):
        yield start, min(start + fixed, count), fixed


def _filled(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """`size` of the images, again from the first where there are fewer."""
    return images if len(images) == size else images[np.arange(size) % len(images)]

"""Proof through onnxruntime: the reference and its candidates on the same images, and the gates that CI stands on.

Accuracy is reported where labels are real. Synthesized images carry targets, which are no ground truth; there the
figures are agreement, KL divergence and the logits' signal-to-noise ratio. Every candidate runs with graph
optimisations on (what is reported) and off; when fusing takes the logits substantially farther from the reference than
compression itself does, that is a failure and not rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.input_spec import InputSpec
from converters.layer_values import saturating_layers
from converters.runtime import Session, fill
from recipes.images import ImageSet, LabelKind, named_in_errors
from recipes.layer_noise import LayerNoise, measure_layers, ratio
from recipes.progress import Progress, Silent
from recipes.refusals import GateError

BATCH = 50
FUSION_SHARE = 0.25
"""Largest noise, as a share of the compression's own, that graph optimisations may add."""
CHANGED_SHARE = 0.5
"""Largest change by graph optimisations, as a share of the compression's noise, where activations are in float."""
ROUNDED_SHARE = 1.25
"""The same where they are quantized, as a share of the noise with and without optimisations together.

Float rounding moves some values over a boundary between two steps, and deep networks make of it other noise in the
place of as much that was there (a random ViT-Tiny at W8A8: 26.7 dB with optimisations, 26.8 without, 32.1 between the
two). Two roundings that have nothing in common differ by the sum of their noise, which no file proved exact step by
step has come to: the most was 0.9 of one of them (ConvMixer, random weights).
"""
FUSION_FLOOR = 1e-6
"""Noise relative to signal (-60 dB) below which nothing is asked: float rounding."""
HALF_FLOOR = 3e-5
"""The same (-45 dB) of files that compute in 16 bits, whose rounding optimisations move from node to node: `excite` and
`residual` as float16 change by -54 and -59 dB."""
OPTIMISATIONS = "optimisations"
"""The gate on onnxruntime's graph optimisations."""
SLACK = 1e-9
"""Shares of images are compared as if exact: 0.95 - 0.94 is a little more than 0.01 in floating point."""

Logits = NDArray[np.float64]


class UnsettledError(MixMixError):
    """A file whose answers depend on what else is in the batch."""


class LabelError(MixMixError):
    """Labels that are none of a model's classes."""


@dataclass(frozen=True)
class Gates:
    """Limits as fractions; None asks nothing."""

    max_drop: float | None = None
    min_top1: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True)
class Run:
    """What a model makes of all images, and how long that took."""

    logits: Logits
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one candidate."""

    gate: str
    passed: bool
    reason: str
    """The figure and its limit."""
    seconds: float = 0.0
    """How long the run took that it was judged on, which other gates may have been judged on too."""


@dataclass(frozen=True)
class Reference:
    """The model that candidates are held against."""

    path: Path
    top1: float | None
    top5: float | None
    size_bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Candidate:
    """One candidate's figures; `snr` is in dB. `verdicts` are those of the gates asked for, and two that always are."""

    path: Path
    top1: float | None
    top5: float | None
    agreement: float
    kl: float
    snr: float
    drop: float | None
    size_bytes: int
    latency_ms: float
    fusion_snr: float
    verdicts: list[Verdict] = field(default_factory=list)
    layers: list[LayerNoise] | None = None
    """Those that hurt most first; None where they were not asked for."""

    @property
    def failed(self) -> list[str]:
        """Names of the gates that it did not pass."""
        return [verdict.gate for verdict in self.verdicts if not verdict.passed]

    @property
    def passed(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class Validation:
    """The whole result; `passed` decides the exit status."""

    reference: Reference
    candidates: list[Candidate]
    images: int
    labels: LabelKind
    beside: list[Candidate] = field(default_factory=list)
    """Others that no gate is asked of, such as a student before it was taught."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)


def softmax(logits: Logits) -> Logits:
    """Row-wise, shifted for stability."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def divergence(reference: Logits, other: Logits) -> float:
    """Mean KL(reference || other) in nats of the class distributions."""
    found = float((softmax(reference) * (log_softmax(reference) - log_softmax(other))).sum(1).mean())
    return max(found, 0.0)  # of equal distributions rounding leaves a little less than nothing


def decibels(reference: Logits, other: Logits) -> float:
    """Signal-to-noise ratio of `other` against `reference`: 10 log10(power / power of the difference)."""
    return ratio(float(np.square(reference).sum()), float(np.square(other - reference).sum()))


def top_k(logits: Logits, labels: NDArray[np.int64], k: int) -> float:
    """Share of rows whose label is among the k largest logits."""
    best = np.argpartition(-logits, min(k, logits.shape[1]) - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def require_labels(images: ImageSet, gates: Gates) -> None:
    """Raise GateError when a gate on accuracy is asked for and the images have no real labels."""
    asked = [n for n, v in (("--max-drop", gates.max_drop), ("--min-top1", gates.min_top1)) if v is not None]
    if asked and images.label_kind != "real":
        raise GateError(
            f"{images.source} has no real labels, which {asked[0]} needs: give labelled images, or hold its"
            " agreement instead (mixmix validate --min-agreement)"
        )


def validate(
    reference: Classifier,
    candidates: Sequence[Classifier],
    images: ImageSet,
    gates: Gates | None = None,
    *,
    beside: Sequence[Classifier] = (),
    layers: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Validation:
    """Run all models on all images, and with `layers` compare every layer's output on the first few.

    Those `beside` the candidates get figures, and pass and fail nothing.
    Raises GateError when a gate needs labels that are not there, and UnsettledError where a candidate would not be
    judged as it is on disk.
    """
    gates, progress, started = gates or Gates(), progress or Silent(), time.perf_counter()
    require_labels(images, gates)
    mended = next((candidate for candidate in candidates if not candidate.is_file), None)
    if mended is not None:
        raise UnsettledError(
            f"{mended.path} is written in training mode, so that each answer depends on the whole batch: export it in"
            " evaluation mode"
        )
    labels = images.labels.numpy() if images.labels is not None and images.label_kind == "real" else None
    judged: list[Candidate] = []
    with progress.task("validating", 1 + 2 * len([*candidates, *beside]) + layers * len(candidates)) as task:
        logits = _logits(reference, reference, images, threads=threads)
        check_labels(images, logits.shape[1], reference)
        top1, top5 = _accuracy(logits, _class_indices(labels, reference, reference))
        latency = _latency(reference, reference, images, threads)
        held = Reference(reference.path, top1, top5, reference.size_bytes, latency)
        task.advance()
        for candidate in (*candidates, *beside):
            fused = _run(candidate, reference, images, threads=threads)
            task.advance()
            plain = _run(candidate, reference, images, threads=threads, optimise=False)
            if fused.logits.shape != logits.shape:
                raise MixMixError(
                    f"{candidate.path} has {fused.logits.shape[1]} classes, {reference.path} has {logits.shape[1]}:"
                    " give models of one task"
                )
            latency = _latency(candidate, reference, images, threads)
            indices = _class_indices(labels, candidate, reference)
            judged.append(_judge(candidate, held, logits, fused, plain, indices, latency, gates))
            task.advance()
            if layers and len(judged) <= len(candidates):
                judged[-1] = replace(judged[-1], layers=compare_layers(candidate, reference, images, threads=threads))
                task.advance()
    shown = [replace(figures, verdicts=[]) for figures in judged[len(candidates) :]]
    seconds = time.perf_counter() - started
    return Validation(held, judged[: len(candidates)], len(images), images.label_kind, shown, seconds)


def _judge(
    candidate: Classifier,
    reference: Reference,
    expected: Logits,
    fused: Run,
    plain: Run,
    indices: NDArray[np.int64] | None,
    latency: float,
    gates: Gates,
) -> Candidate:
    logits = fused.logits
    top1, top5 = _accuracy(logits, indices)
    agreement = float((logits.argmax(1) == expected.argmax(1)).mean())
    drop = reference.top1 - top1 if reference.top1 is not None and top1 is not None else None
    finite = all(bool(np.isfinite(run.logits).all()) for run in (fused, plain))
    word = "finite" if finite else "infinite or no numbers"
    verdicts = [*_asked(gates, drop, top1, agreement), Verdict("finite", finite, f"logits are {word}")]
    verdicts = [replace(verdict, seconds=fused.seconds) for verdict in verdicts]
    floor = HALF_FLOOR if candidate.computes_in_halves else FUSION_FLOOR
    verdict = _optimisations(expected, fused, plain, floor, _quantizes_activations(candidate))
    verdicts.append(_explained(verdict, candidate))
    return Candidate(
        path=candidate.path,
        top1=top1,
        top5=top5,
        agreement=agreement,
        kl=divergence(expected, logits),
        snr=decibels(expected, logits),
        drop=drop,
        size_bytes=candidate.size_bytes,
        latency_ms=latency,
        fusion_snr=decibels(plain.logits, logits),
        verdicts=verdicts,
    )


def _quantizes_activations(candidate: Classifier) -> bool:
    return any("QuantizeLinear" in node.op_type for node in candidate.original.graph)


def _optimisations(expected: Logits, fused: Run, plain: Run, least: float, rounding: bool) -> Verdict:
    """What graph optimisations add to the noise of compression, and what they change, beside it.

    Nothing is asked below `least`, a share of the logits' power; `rounding` says that activations are quantized.
    """
    floor = least * float(np.square(plain.logits).sum())
    noise, total = (float(np.square(run.logits - expected).sum()) for run in (plain, fused))
    change, added = float(np.square(fused.logits - plain.logits).sum()), max(0.0, total - noise)
    most = ROUNDED_SHARE * (noise + total) if rounding else CHANGED_SHARE * noise
    passed = not (change > max(most, floor) or added > max(FUSION_SHARE * noise, floor))
    reason = (
        f"graph optimisations change the logits by {change:.2g}, and add {added:.2g} to {noise:.2g} of noise (squared)"
    )
    return Verdict(OPTIMISATIONS, passed, reason, plain.seconds)


def _explained(verdict: Verdict, candidate: Classifier) -> Verdict:
    """A failure of optimisations with the one cause that is known, where the file may have it.

    Files for other devices than this machine's processor are written so on purpose.
    """
    layers = [] if verdict.passed else saturating_layers(candidate)
    if not layers:
        return verdict
    reason = (
        f"{verdict.reason}; it may come of 8-bit weights beside 8-bit inputs (layers: {len(layers)}), which saturate on"
        " x86 processors without VNNI, and on no GPU: for this machine, --target ort-cpu and portable keep to 7 bits"
    )
    return replace(verdict, reason=reason)


def _asked(gates: Gates, drop: float | None, top1: float | None, agreement: float) -> list[Verdict]:
    """Verdicts of the gates that have a limit."""
    limits: tuple[tuple[str, float | None, float | None, int], ...] = (
        ("max-drop", drop, gates.max_drop, -1),
        ("min-top1", top1, gates.min_top1, 1),
        ("min-agreement", agreement, gates.min_agreement, 1),
    )
    return [
        Verdict(gate, sign * (value - limit) >= -SLACK, f"{gate.split('-')[1]} {value:.4f}, {gate[:3]} {limit:g}")
        for gate, value, limit, sign in limits
        if value is not None and limit is not None
    ]


def spec_beside(model: Classifier, reference: Classifier) -> InputSpec:
    """How a model is given images: as it says, and where it does not say so for certain, as the reference is."""
    spec = model.spec
    if spec.source in ("assumed", "detected") and spec.channel_count == reference.spec.channel_count:
        sure = model.detection is not None and model.detection.confidence == 1
        taken = [] if sure else ["channels", "scale", "mean", "std"]
        if sure and spec.channels == "rgb":  # arithmetic alike in all channels does not tell their order
            taken.append("channels")
        if model.open_size:
            taken.append("size")
        spec = spec.model_copy(update={key: getattr(reference.spec, key) for key in taken})
    return spec


def _inputs(model: Classifier, reference: Classifier, images: ImageSet, start: int, stop: int) -> NDArray[np.float32]:
    spec = spec_beside(model, reference)
    with named_in_errors(images):
        return np.ascontiguousarray(spec.to_input(images.pixels[start:stop]).numpy())


def compare_layers(
    candidate: Classifier, reference: Classifier, images: ImageSet, *, threads: int = 0
) -> list[LayerNoise]:
    """Every layer of the candidate beside the reference's, those that hurt most first."""

    def inputs(model: Classifier, start: int, stop: int) -> NDArray[np.float32]:
        return _inputs(model, reference, images, start, stop)

    return measure_layers(reference, candidate, inputs, len(images), threads=threads)


def _run(model: Classifier, reference: Classifier, images: ImageSet, *, threads: int, optimise: bool = True) -> Run:
    started = time.perf_counter()
    logits = _logits(model, reference, images, threads=threads, optimise=optimise)
    return Run(logits, time.perf_counter() - started)


def _logits(
    model: Classifier, reference: Classifier, images: ImageSet, *, threads: int, optimise: bool = True
) -> Logits:
    session = model.session(optimise=optimise, threads=threads)
    batch = model.fixed_batch or min(BATCH, len(images))
    step = -(-BATCH // batch) * batch
    parts = [
        session.run_in_batches(_inputs(model, reference, images, start, start + step), batch)
        for start in range(0, len(images), step)
    ]
    return against_nothing(np.concatenate(parts).reshape(len(images), -1).astype(np.float64))


def against_nothing(logits: Logits) -> Logits:
    """A single logit [N, 1] as that of the second of two classes, the first one's being 0: so a sigmoid takes it."""
    return np.concatenate([np.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _latency(model: Classifier, reference: Classifier, images: ImageSet, threads: int) -> float:
    """Milliseconds an image, one at a time, or its share of a batch that the file insists on."""
    batch = model.fixed_batch or 1
    one = _inputs(model, reference, images, 0, batch)
    return Session(model.path, threads=threads).latency(fill(one, batch)) / batch


def _class_indices(
    labels: NDArray[np.int64] | None, model: Classifier, reference: Classifier
) -> NDArray[np.int64] | None:
    """The class of each label among a model's, whose `offset` is the reference's where it does not say its own."""
    speaks = model if "offset" in model.spec.model_fields_set else reference
    return None if labels is None else labels + speaks.spec.offset


def _accuracy(logits: Logits, indices: NDArray[np.int64] | None) -> tuple[float | None, float | None]:
    if indices is None:
        return None, None
    return top_k(logits, indices, 1), top_k(logits, indices, 5) if logits.shape[1] >= 5 else None


def count_classes(model: Classifier, images: ImageSet) -> int:
    """How many classes a model tells apart: 2 for a single logit."""
    return _logits(model, model, images.take(1), threads=0).shape[1]


def check_labels(images: ImageSet, classes: int, model: Classifier) -> None:
    """Raise LabelError when real labels are none of a model's classes."""
    if images.labels is None or images.label_kind != "real" or not len(images):
        return
    if images.classes is not None and images.classes + model.spec.offset != classes:
        raise LabelError(
            f"{images.source} has {images.classes} folders, {model.path} has {classes} classes, so that their order"
            " does not tell the class: name each folder by its class index"
        )
    low, high = int(images.labels.min()), int(images.labels.max())
    if low + model.spec.offset < 0 or high + model.spec.offset >= classes:
        wrong = low if low + model.spec.offset < 0 else high
        raise LabelError(
            f"{images.source} has label {wrong}, {model.path} has {classes} classes: give images of the model's task"
        )

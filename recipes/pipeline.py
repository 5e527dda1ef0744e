"""Where recipes meet: images from whatever the user has, a smaller model from them, and the proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError, OutputError
from converters.load import load_classifier
from converters.targets import PORTABLE, Target
from converters.torch_module import TorchClassifier
from converters.writeback import prepare_for_quantization
from recipes.account import Compression, LayerAccount
from recipes.budget import Budget
from recipes.checkpoint import left_beside
from recipes.distill.engine import check_count, check_pair, distill
from recipes.distill.settings import DistillSettings
from recipes.image_store import OtherSetError, in_short
from recipes.images import ImageSet, load_images
from recipes.progress import Progress
from recipes.prune.engine import check_goal, prune, prune_in_memory
from recipes.prune.goal import PROVENANCE, Goal
from recipes.prune.settings import PruneSettings
from recipes.quantize.asked import check_bits, least_bits, what_was_asked
from recipes.quantize.engine import quantize
from recipes.quantize.mixed import find_placements
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.tables import file_size
from recipes.ranks import ALONE, Ranks
from recipes.refusals import MANIFEST, check_compression
from recipes.settings import Effort
from recipes.synth.engine import synthesize
from recipes.synth.settings import SynthSettings, load_synth_recipe
from recipes.validate import (
    OPTIMISATIONS,
    Gates,
    LabelError,
    Validation,
    check_labels,
    compare_layers,
    count_classes,
    require_labels,
    validate,
)

MOST_AT_ONCE = 8
"""Images whose values in all layers, of two files, are in memory together without having been asked for."""
SMALL = 64
"""Pixels a side up to which the recipes for small images are taken: measured at 28, and the others at 224."""


def convert_all(classifiers: Sequence[Classifier], device: torch.device, progress: Progress) -> list[TorchClassifier]:
    """Each classifier as a torch module on `device`, compared with onnxruntime."""
    modules = []
    with progress.task("converting and checking models", len(classifiers)) as task:
        for classifier in classifiers:
            modules.append(to_torch(classifier).to(device))
            task.advance(1, classifier.name)
    return modules


def load_suitable_recipe(
    name: str | None,
    models: Sequence[Classifier],
    effort: Effort,
    overrides: Iterable[str],
    steps: int | None,
    changes: Mapping[str, Any],
    progress: Progress,
) -> tuple[str, SynthSettings]:
    """The recipe of that name, or the one that fits the models.

    That is `small` for images of up to SMALL pixels a side, and else `default`; `small-labels` and `labels` where no
    model has statistics.
    """
    if name is None:
        small = max(max(model.spec.size) for model in models) <= SMALL
        if any(model.has_statistics for model in models):
            name = "small" if small else "default"
        else:
            name = "small-labels" if small else "labels"
            progress.say(
                "no model has BatchNorm statistics: images are shaped by labels, and by how even training leaves the"
                f" channels of convolutions and LayerNormalization (recipe {name}), and what fits them may fit real"
                " ones less; name models that have statistics too, if you can (quantize --zoo MODELS; synth MODELS)"
            )
    return name, load_synth_recipe(name, effort, overrides, steps, changes)


def choose_models(models: Sequence[Classifier], settings: SynthSettings, recipe: str) -> list[Classifier]:
    """Those of the models that the recipe asks for. Raises MixMixError naming what is missing."""
    if settings.models is None:
        return list(models)
    given = {model.name: model for model in models}
    if len(given) < len(models):
        raise MixMixError(f"recipe {recipe} finds models by file name, and two have the same: rename one")
    missing = [f"{name}.onnx" for name in settings.models if name not in given]
    if missing:
        raise MixMixError(
            f"recipe {recipe} is for {', '.join(settings.models)}, and {', '.join(missing)} is not among the models:"
            " name it too (mixmix zoo export writes the files), or take another recipe"
        )
    return [given[name] for name in settings.models]


class How(TypedDict):
    """Keyword arguments that all engines take."""

    seed: int
    device: torch.device
    overwrite: bool
    progress: Progress


@dataclass(frozen=True)
class Request:
    """What a command that writes a smaller model is asked for: the model, where images come from, and how."""

    classifier: Classifier
    zoo: Sequence[Classifier]
    data: Path | None
    output: Path
    recipe: str
    """Name of the settings, for the file's provenance."""
    synth_recipe: str | None
    """Of the images that are made; None for the one that fits the models."""
    effort: Effort
    images: int | None
    """How many to use of `data`, or to make."""
    gates: Gates
    seed: int
    device: torch.device
    overwrite: bool
    version: str
    student: Classifier | None = None
    """Whom `classifier` teaches, where it is not itself made smaller."""
    ranks: Ranks = ALONE
    """Who works on it; `prune` is for one process."""

    @property
    def provenance(self) -> dict[str, str]:
        """What the written file says of where it comes from."""
        return {
            "mixmix.version": self.version,
            "mixmix.recipe": self.recipe,
            "mixmix.source.sha256": (self.student or self.classifier).sha256,
        }

    def how(self, progress: Progress) -> How:
        """What every engine is told alike."""
        return {"seed": self.seed, "device": self.device, "overwrite": self.overwrite, "progress": progress}


@dataclass(frozen=True)
class Write:
    """How a command makes its smaller model."""

    check: Callable[[Request], None]
    """Raises MixMixError for what cannot work on any images, before they are made."""
    write: Callable[[Request, ImageSet, Progress], Compression]
    """Makes the smaller model from the images and writes it."""


def compress(request: Request, write: Write, progress: Progress) -> tuple[Compression, Validation]:
    """Images, the smaller file, and its validation on them. What cannot work is refused before any work is done."""
    classifier, gates = request.classifier, request.gates
    given = (classifier, *request.zoo, *([request.student] if request.student is not None else []))
    models = (model.path for model in given)
    check_compression(models, request.output, request.data, gates.max_drop, overwrite=request.overwrite)
    if request.data is None:  # the engine refuses too, but only when it has images
        write.check(request)
    try:
        images, result = _make(request, write, progress)
    except KeyboardInterrupt:
        if left_beside(request.output):
            progress.say("the same command goes on from what is done")
        raise
    try:
        return result, request.ranks.lead(lambda: _validate(request, result, images, progress))
    except KeyboardInterrupt:
        progress.say(
            f"{request.output} is whole, and only its comparison with {classifier.path} is missing: mixmix validate"
        )
        raise


def _validate(request: Request, result: Compression, images: ImageSet, progress: Progress) -> Validation:
    """The written file beside the model, and layer by layer where that can be had."""
    classifier, written = request.classifier, load_classifier(request.output)
    before = [] if request.student is None else [request.student]
    found = validate(classifier, [written], images, request.gates, beside=before, progress=progress)
    if result.runs_elsewhere:
        found = _judged_elsewhere(found, result, progress)
    if request.student is not None:  # its layers answer to none of its teacher's
        return found
    if max(classifier.fixed_batch or 0, written.fixed_batch or 0) > MOST_AT_ONCE:
        progress.say(
            f"layers are not compared, as {request.output} takes {written.fixed_batch} images at once, and all values"
            " of so many may not fit into memory: mixmix validate --layers"
        )
        return found
    try:
        with progress.task("comparing layers", 1) as task:
            layers = compare_layers(written, classifier, images)
            task.advance()
    except MixMixError as error:  # the file is whole, and this is no proof of it
        progress.say(f"layers are not compared: {error}")
        return found
    (candidate,) = found.candidates
    return replace(found, candidates=[replace(candidate, layers=layers)])


def _judged_elsewhere(found: Validation, result: Compression, progress: Progress) -> Validation:
    """Without the gate on what this machine's kernels make of a file that is for other ones; that is said instead."""
    (candidate,) = found.candidates
    for verdict in candidate.verdicts:
        if verdict.gate == OPTIMISATIONS and not verdict.passed:
            progress.say(
                f"figures are of this machine's processor, where {verdict.reason}; {result.target} has its own"
            )
    kept = [verdict for verdict in candidate.verdicts if verdict.gate != OPTIMISATIONS]
    return replace(found, candidates=[replace(candidate, verdicts=kept)])


def _make(request: Request, write: Write, progress: Progress) -> tuple[ImageSet, Compression]:
    """The images, and what was made and written with them, in seconds that making the images counts in."""
    started = time.perf_counter()
    classifier, gates = request.classifier, request.gates
    images = calibration_images(request, progress)
    require_labels(images, gates)
    if images.label_kind == "real":
        try:
            check_labels(images, count_classes(classifier, images), classifier)
        except LabelError as error:
            if gates.max_drop is not None:
                raise
            progress.say(f"labels left aside: {error}")
            images = replace(images, labels=None, label_kind="none")
    result = write.write(request, images, progress)
    return images, replace(result, seconds=time.perf_counter() - started)


def check_quantizable(
    request: Request, settings: QuantizeSettings, bits: int | Budget, act_bits: int | None, target: Target
) -> None:
    """Raise MixMixError for a model, or a budget, that it cannot be quantized to, whatever the images.

    A file also says how many images there were and, of activations of few bits, which channels were equalised: a
    budget of bytes that is a little above what is refused here may still be refused afterwards.
    """
    classifier = request.classifier
    module = to_torch(prepare_for_quantization(classifier, target, least_bits(bits), act_bits))
    if isinstance(bits, Budget):
        asked = what_was_asked(settings, bits, act_bits, target, request.images or 0, request.seed)
        metadata = {**classifier.spec.to_metadata(), **asked, **request.provenance}
        size = partial(file_size, module, act_bits=act_bits, target=target, settings=settings, metadata=metadata)
        find_placements(module, bits, act_bits, target, settings, size)  # refuses what cannot be kept


def quantizing(
    settings: QuantizeSettings, bits: int | Budget, act_bits: int | None = None, target: Target = PORTABLE
) -> Write:
    """`mixmix quantize`. Raises MixMixError for widths that cannot be written."""
    check_bits(bits, act_bits)

    def check(request: Request) -> None:
        check_quantizable(request, settings, bits, act_bits, target)

    def write(request: Request, images: ImageSet, progress: Progress) -> Compression:
        return quantize(
            request.classifier,
            images,
            request.output,
            settings,
            bits,
            act_bits,
            target,
            **request.how(progress),
            provenance=request.provenance,
            ranks=request.ranks,
        )

    return Write(check, write)


def pruning(settings: PruneSettings, goal: Goal) -> Write:
    """`mixmix prune`."""

    def check(request: Request) -> None:
        check_goal(request.classifier, settings, goal)

    def write(request: Request, images: ImageSet, progress: Progress) -> Compression:
        return prune(
            request.classifier,
            images,
            request.output,
            settings,
            goal,
            **request.how(progress),
            provenance=request.provenance,
        )

    return Write(check, write)


def distilling(settings: DistillSettings) -> Write:
    """`mixmix distill`: the request's classifier is the teacher."""

    def check(request: Request) -> None:
        assert request.student is not None
        check_pair(request.classifier, request.student)
        if request.images is not None:
            check_count(request.images, f"--images {request.images}")

    def write(request: Request, images: ImageSet, progress: Progress) -> Compression:
        assert request.student is not None
        return distill(
            request.classifier,
            request.student,
            images,
            request.output,
            settings,
            **request.how(progress),
            provenance=request.provenance,
            ranks=request.ranks,
        )

    return Write(check, write)


def pruning_then_quantizing(
    settings: PruneSettings,
    goal: Goal,
    quantize_settings: QuantizeSettings,
    bits: int,
    act_bits: int | None = None,
    target: Target = PORTABLE,
) -> Write:
    """`mixmix prune --bits`: one file, whose weights are few and of few bits; what was removed stays zero.

    The second step reconstructs the blocks of the pruned model. Raises MixMixError for widths that cannot be written.
    """
    check_bits(bits, act_bits)

    def check(request: Request) -> None:
        check_goal(request.classifier, settings, goal)
        check_quantizable(request, quantize_settings, bits, act_bits, target)

    def write(request: Request, images: ImageSet, progress: Progress) -> Compression:
        pruned = prune_in_memory(
            request.classifier,
            images,
            request.output,
            settings,
            goal,
            **request.how(progress),
        )
        made = goal.to_json(images, request.seed, macs_left=pruned.macs_left, settings=settings.changed())
        result = quantize(
            pruned.classifier(),
            images,
            request.output,
            quantize_settings,
            bits,
            act_bits,
            target,
            **request.how(progress),
            provenance=request.provenance | {PROVENANCE: made},
        )
        if pruned.checkpoint is not None:
            pruned.checkpoint.remove()
        layers = [_as_pruned(layer, pruned.layers) for layer in result.layers]
        return replace(result, layers=layers, sparsity=pruned.sparsity, macs_left=pruned.macs_left)

    return Write(check, write)


def _as_pruned(layer: LayerAccount, pruned: Sequence[LayerAccount]) -> LayerAccount:
    """A quantized layer's account with what pruning took from it; more of its weights may have been rounded to zero."""
    before = next((each for each in pruned if each.name == layer.name), layer)
    return replace(layer, sparsity=before.sparsity, whole=before.whole)


def calibration_images(request: Request, progress: Progress) -> ImageSet:
    """The user's own images, or images made from the zoo, or from the target itself when there is neither.

    Made images are kept in `MODEL.images` (or `MODEL.images64`, where 64 are asked for) beside the output, where an
    interrupted or repeated run finds them again.
    Raises MixMixError where no image can be had.
    """
    target = request.classifier
    if request.data is not None:
        given = load_images(request.data, request.images, size=target.spec.size)
        if request.images is not None and len(given) < request.images:
            progress.say(f"{request.data} has {len(given)} images, and all of them are used")
        return given
    models = request.zoo or [target]
    recipe, settings = load_suitable_recipe(
        request.synth_recipe, models, request.effort, (), None, {"images": request.images}, progress
    )
    modules = convert_all(choose_models(models, settings, recipe), request.device, progress)
    number = "" if request.images is None else str(request.images)
    directory = request.output.parent / f"{target.name}.images{number}"
    found = request.ranks.lead(lambda: _were_made(directory, overwrite=request.overwrite))  # before anyone makes them
    try:
        synthesize(
            modules,
            directory,
            settings,
            recipe=recipe,
            size=target.spec.size,
            seed=request.seed,
            resume=found,
            overwrite=request.overwrite,
            progress=progress,
            versions={"mixmix": request.version},
            ranks=request.ranks,
        )
    except OtherSetError as error:
        why = f" ({in_short(error.differences)})" if error.differences else ""
        raise OutputError(
            f"{directory} holds images that were made of other models, or with another seed, number or recipe{why}: use"
            f" them as they are with --data {directory}, move them, or make new ones with --force"
        ) from error
    progress.say(f"calibration images, made from the models, are in {directory}")
    request.ranks.wait()
    return load_images(directory)


def _were_made(directory: Path, *, overwrite: bool) -> bool:
    """Whether an earlier run has left images. Raises OutputError for a folder that is none of ours."""
    found = directory.exists()
    if found and not overwrite and not (directory / MANIFEST).is_file():
        raise OutputError(f"{directory}, where made images go, is there already: move it, or give images with --data")
    return found

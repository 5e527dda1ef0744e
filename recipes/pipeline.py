"""Where recipes meet: images from whatever the user has, for whoever needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from converters.classifier import Classifier
from converters.torch_module import TorchClassifier, to_torch
from recipes.images import ImageSet, load_images
from recipes.progress import Progress
from recipes.synth.engine import synthesize
from recipes.synth.settings import SynthSettings


def convert_all(classifiers: Sequence[Classifier], device: torch.device, progress: Progress) -> list[TorchClassifier]:
    """Each classifier as a torch module on `device`, compared with onnxruntime."""
    modules = []
    with progress.task("converting and checking models", len(classifiers)) as task:
        for classifier in classifiers:
            modules.append(to_torch(classifier).to(device))
            task.advance(1, classifier.name)
    return modules


def calibration_images(
    target: Classifier,
    data: Path | None,
    zoo: Sequence[Classifier],
    beside: Path,
    settings: SynthSettings,
    *,
    recipe: str,
    limit: int | None,
    seed: int,
    device: torch.device,
    progress: Progress,
    versions: Mapping[str, str] | None = None,
) -> ImageSet:
    """The user's own images, or images made from the zoo, or from the target itself when there is neither.

    Made images are kept in `MODEL.images` beside the output, where an interrupted or repeated run finds them again.
    Raises MixMixError where no image can be had.
    """
    if data is not None:
        return load_images(data, limit, size=target.spec.size)
    modules = convert_all(zoo or [target], device, progress)
    directory = beside / f"{target.name}.images"
    resume = directory.exists()
    synthesize(
        modules,
        directory,
        settings,
        recipe=recipe,
        size=target.spec.size,
        seed=seed,
        resume=resume,
        progress=progress,
        versions=versions,
    )
    progress.say(f"calibration images {'found again' if resume else 'made from the models'}: {directory}")
    return load_images(directory)

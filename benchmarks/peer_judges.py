"""What `peer_mct.py judge` measures: the net quantized on a set, and how it answers on real images."""

from __future__ import annotations

import tempfile
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0 import SPEC, export, logits
from photographs import random_crops
from train_zoo import DATA, load_split

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from recipes import zoo
from recipes.images import ImageSet, from_bytes, load_images
from recipes.pipeline import load_suitable_recipe
from recipes.progress import Silent
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNING
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.validate import decibels, validate

LITE0 = "lite0"


@cache
def float_classifier(name: str, folder: Path) -> Classifier:
    return load_classifier(export(folder)[0], SPEC) if name == LITE0 else load_classifier(zoo.model_path(name))


def synthesized(
    name: str, recipe: str | None, steps: int | None, seed: int, images: int, folder: Path
) -> tuple[Path, float]:
    """Our set from the one net by a recipe, or by the one that fits it, and the seconds it took, writing included."""
    model = float_classifier(name, folder)
    recipe, settings = load_suitable_recipe(recipe, [model], "default", (), steps, {"images": images}, Silent())
    started = time.perf_counter()
    directory = folder / f"ours-{name}-{recipe}-{steps}-{seed}"
    synthesize([to_torch(model)], directory, settings, recipe=recipe, seed=seed, overwrite=True)
    return directory, time.perf_counter() - started


def judge_set(name: str, path: Path, seed: int) -> list[float]:
    """Embedded nets: top-1 in per cent and SNR in dB at W2, at W2A4 and with 70 % zeros.

    EfficientNet-Lite0: agreement and SNR at W4.
    """
    reference, images = float_classifier(name, path.parent), load_images(path)
    recipe = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast")
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "q.onnx"
        if name == LITE0:
            quantize(reference, images, output, recipe, 4, seed=seed)
            crops = random_crops()
            expected, actual = (logits(file, reference, crops) for file in (reference.path, output))
            return [float((actual.argmax(1) == expected.argmax(1)).mean()), decibels(expected, actual)]
        pictures, labels = load_split(DATA, "t10k")
        judging = ImageSet(
            from_bytes(pictures[5000:, :, :, None]), torch.from_numpy(labels[5000:].astype(np.int64)), "real"
        )
        goal, pruning = make_goal("unstructured", 0.7), load_recipe(PruneSettings, PRUNING, "obs")
        for write in (
            partial(quantize, settings=recipe, bits=2),
            partial(quantize, settings=recipe, bits=2, act_bits=4),
            partial(prune, settings=pruning, goal=goal),
        ):
            write(reference, images, output, seed=seed, overwrite=True)
            (judged,) = validate(reference, [load_classifier(output)], judging, threads=1).candidates
            found += [100 * (judged.top1 or 0.0), judged.snr]
    return found

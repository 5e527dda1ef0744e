"""What `test_elsewhere.py` looks at: every engine with its tensors elsewhere, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.conversion import to_torch
from converters.load import load_classifier
from recipes import zoo
from recipes.catalogue import KINDS
from recipes.compare import compare
from recipes.distill.engine import distill
from recipes.images import ImageSet, load_images
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.quantize.engine import quantize
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from tests.elsewhere import ELSEWHERE, Watch

ENGINES: dict[str, Callable[..., object]] = {"quantize": quantize, "prune": prune, "distill": distill}
CPU = torch.device("cpu")
FEW, MORE = 2, 4
"""Steps of the shorter of two runs, and by how many the longer one, whose waits are compared, is longer."""

Run = Callable[[torch.device, int, Path], Tensor]
"""What comes of an engine on a device, after so many steps."""


def as_words(overrides: dict[str, Any]) -> list[str]:
    """As --set takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def synth(recipe: str, *names: str, **changes: Any) -> Run:
    """The pixels that come of it."""

    def run(device: torch.device, steps: int, folder: Path) -> Tensor:
        overrides = {"stages": [{"scale": 0.5, "steps": 2}, {"scale": 1.0, "steps": steps}]} | changes
        settings = load_synth_recipe(recipe, "default", as_words(overrides), None, {"images": 8})
        modules = [to_torch(load_classifier(zoo.model_path(name))).to(device) for name in names]
        synthesize(modules, folder, settings, recipe=recipe, size=None, seed=0)
        return load_images(folder).pixels

    return run


def smaller(command: str, recipe: str, *how: Any, **changes: Any) -> Run:
    """The logits of the file that comes of it."""

    def run(device: torch.device, steps: int, folder: Path) -> Tensor:
        overrides = {key: steps if value == "steps" else value for key, value in changes.items()}
        kind = KINDS[command]
        settings = load_recipe(kind.settings, kind.package, recipe, "fast", as_words(overrides))
        model, output = load_classifier(zoo.model_path("plain")), folder.with_suffix(".onnx")
        models = [model, load_classifier(zoo.model_path("residual"))] if command == "distill" else [model]
        ENGINES[command](*models, images(), output, settings, *how, device=device)
        small = load_classifier(output)
        return torch.from_numpy(small.session().run(small.spec.to_input(images().pixels).numpy())[0])

    return run


def distances(device: torch.device, _steps: int, _folder: Path) -> Tensor:
    real, pixels = images(), images().pixels
    few, others = (dataclasses.replace(real, pixels=part, labels=None) for part in pixels.split(4))
    found = compare(to_torch(load_classifier(zoo.model_path("plain"))).to(device), few, others, permutations=2)
    assert found.to_stored is not None
    return torch.tensor([100 * found.mmd2, found.distance, *found.to_stored, *(of for _, of in found.layers)])


def images() -> ImageSet:
    return load_images(zoo.calibration_images_path(), 8)


QUICK: dict[str, Any] = {"precision": "float32", "sensitive_images": 2}
"""Not every processor would choose this precision."""
COARSE = {"range_steps": 20}
EVERYTHING: dict[str, Any] = {"batch": 4, "shift": 0.1, "jitter": [0.2, 0.2, 0.2, 0.1]}
RUNS: dict[str, Run] = {
    "synth small": synth("small", "plain"),
    "synth paper": synth("paper", "plain", "residual", **EVERYTHING),
    "synth small-labels": synth("small-labels", "inverted_folded"),
    "compare": distances,
    "quantize": smaller("quantize", "qdrop", 4, 4, steps="steps", **QUICK, **COARSE),
    "quantize qat": smaller("quantize", "qat", 4, 4, steps=2, train_steps="steps", train_batch=8, **QUICK, **COARSE),
    "prune": smaller("prune", "obs", make_goal("unstructured", 0.5), steps=2, mask_steps=2, **QUICK),
    "prune channels": smaller("prune", "obs", make_goal("channel", 0.3), steps=2, mask_steps=2, **QUICK),
    "distill": smaller("distill", "default", steps="steps", batch=8),
}
STEPWISE = ("synth small", "synth paper", "synth small-labels", "quantize", "quantize qat", "distill")
"""Runs of as many steps as they are told; what trains blocks in `prune` is what does so in `quantize`."""


def watched(run: Run, steps: int, folder: Path) -> tuple[Tensor, Watch]:
    """What comes of it elsewhere, and what was to be done there."""
    watch = Watch()
    with watch.kept():
        return run(ELSEWHERE, steps, folder), watch


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name, run in RUNS.items():
        here = run(CPU, FEW, folder / f"{name} here")
        there, short = watched(run, FEW, folder / f"{name} there")
        found[name] = {"difference": float((here - there).norm() / here.norm())}
        if name in STEPWISE:
            _, long = watched(run, FEW + MORE, folder / f"{name} longer")
            found[name] |= {
                "waits": long.waits - short.waits,
                "operations": (long.operations - short.operations) / MORE,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Training dealt out by torchrun comes to what one process comes to; what cannot work is said once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.load import load_classifier
from converters.runtime import Session
from recipes import zoo
from recipes.images import load_images
from tests.mixmix_cli.command import finish, start, torchrun

IMAGES = zoo.calibration_images_path()
MIXMIX = ("-m", "mixmix_cli")
QUICK = ("--set", "steps=2", "--set", "batch=16")
QAT = ("--method", "qat", "--bits", "4", *QUICK, "--set", "train_steps=4")
DATA = ("--data", IMAGES, "-n", "10")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Copies of a target with BatchNorm, and of a teacher."""
    paths = tmp_path / "model.onnx", tmp_path / "teacher.onnx"
    for path, name in zip(paths, ("plain", "residual"), strict=True):
        path.write_bytes(zoo.model_path(name).read_bytes())
    return paths


def logits(path: Path) -> NDArray[np.float32]:
    classifier = load_classifier(path)
    x = classifier.spec.to_input(load_images(IMAGES, 64).pixels)
    return Session(path).run(x.numpy())[0]


def assert_alike(one: Path, other: Path, start: Path) -> None:
    """Far nearer to one another than training has brought them from where it began."""
    first, second, before = (logits(path) for path in (one, other, start))
    apart, moved = np.abs(first - second).max(), np.abs(first - before).max()
    assert moved > 0
    assert apart < 0.01 * moved


@pytest.mark.parametrize(("count", "batch"), [(2, 5), (3, 2)])
def test_quantized_training_in_several_processes(
    count: int, batch: int, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Batches that do not divide evenly, and a process that is left without images."""
    model, files = models[0], [tmp_path / f"{name}.onnx" for name in ("one", "several", "before")]
    quantize = (*MIXMIX, "quantize", model, *DATA, *QAT, "--set", f"train_batch={batch}")
    alone = start(*quantize, "-o", files[0])
    together = start(*torchrun(count), *quantize, "-o", files[1], "--json")
    begun = start(*quantize, "--set", "train_steps=0", "-o", files[2])
    out, _ = finish(together)
    assert json.loads(out)["output"] == str(files[1])  # one document: only the first process speaks
    finish(alone)
    finish(begun)
    assert_alike(*files)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (*models, *files)}


def test_distillation_in_two_processes(models: tuple[Path, Path], tmp_path: Path) -> None:
    """BatchNorm sees the whole batch, whoever computes which part of it."""
    model, teacher = models
    files = tmp_path / "one.onnx", tmp_path / "two.onnx"
    distill = (*MIXMIX, "distill", teacher, model, *DATA, "--steps", "6", "--set", "batch=5")
    alone = start(*distill, "-o", files[0])
    finish(start(*torchrun(2), *distill, "-o", files[1]))
    finish(alone)
    assert_alike(*files, model)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("quantize", "model.onnx", "--bits", "4", "--method", "brecq"), "brecq is work for one process"),
        (("prune", "model.onnx", "--sparsity", "0.5"), "prune is work for one process"),
        (("quantize", "missing.onnx", "--method", "qat", "--bits", "4"), "missing.onnx"),
        (("distill", "teacher.onnx", "model.onnx", "--data", "nowhere"), "nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_said_once(
    command: tuple[str, ...], said: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    words = [tmp_path / word if word.endswith((".onnx", "nowhere")) else word for word in command]
    process = start(*torchrun(2), *MIXMIX, *words)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    assert err.count(said) == 1
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in models}

"""Training shared out by torchrun comes to what one process comes to; what cannot work is said once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import recipes.ranks
from converters.load import load_classifier
from converters.runtime import Session
from recipes import checkpoint, zoo
from recipes.images import load_images
from recipes.ranks import Ranks
from recipes.training import Training
from tests.mixmix_cli.command import run, together

IMAGES = zoo.calibration_images_path()
DATA = ("--data", IMAGES, "-n", "10")
FACTOR = Training.factor


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


def stopping(how: Training, step: int) -> float:
    """The rates of training that is interrupted half-way."""
    if step >= 0.5 * how.steps:
        raise KeyboardInterrupt
    return FACTOR(how, step)


def test_two_processes_quantize_what_one_began(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They reconstruct nothing again, train the other half with batches of 5, and clear up."""
    model, files = models[0], [tmp_path / f"{name}.onnx" for name in ("one", "two", "before")]
    how = ("--method", "qat", "--bits", "4", "--act-bits", "8", "--set", "steps=2", "--set", "train_batch=5")
    quantize = ("quantize", model, *DATA, *how, "--set")
    assert run(capsys, *quantize, "train_steps=6", "-o", files[0], "-q")[0] == 0
    assert run(capsys, *quantize, "train_steps=0", "-o", files[2], "-q")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SECONDS", 0.0)
        patch.setattr(Training, "factor", stopping)
        assert run(capsys, *quantize, "train_steps=6", "-o", files[1])[0] == 130
    assert len(list(tmp_path.glob("*.partial"))) == 1
    out, err = together(2, *quantize, "train_steps=6", "-o", files[1], "--json")
    assert json.loads(out)["output"] == str(files[1])  # one document: only the first process speaks
    assert err.count("what was done before is kept") == 1
    assert_alike(*files)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (*models, *files)}


def test_two_processes_distil_what_one_does(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BatchNorm sees the whole batch, whoever computes which part of it."""
    model, teacher = models
    files = tmp_path / "one.onnx", tmp_path / "two.onnx"
    distill = ("distill", teacher, model, *DATA, "--steps", "6", "--set", "batch=5")
    assert run(capsys, *distill, "-o", files[0], "-q")[0] == 0
    together(2, *distill, "-o", files[1])
    assert_alike(*files, model)


def test_what_cannot_work_is_said_once(models: tuple[Path, Path], tmp_path: Path) -> None:
    """And every process ends with status 2."""
    model, teacher = models
    _, err = together(2, "distill", teacher, model, "--data", tmp_path / "nowhere", status=2)
    assert err.count("nowhere does not exist") == 1
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in models}


def test_methods_without_training_are_refused(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def pair(device: str) -> Iterator[Ranks]:
        yield Ranks(0, 2)

    monkeypatch.setattr(recipes.ranks, "join_ranks", pair)
    status, _, err = run(capsys, "quantize", models[0], "--bits", "4", "--method", "brecq", *DATA)
    assert status == 2
    assert "brecq is work for one process: start it without torchrun, or take --method qat" in err


def test_other_commands_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(recipes.ranks, "say_once", lambda say: say())
    status, _, err = run(capsys, "prune", "model.onnx", "--sparsity", "0.5")
    assert status == 2
    assert "prune is work for one process: start it without torchrun" in err

"""Interrupted and gone on with: the file is that of a run that nobody interrupted, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from converters.classifier import Classifier
from converters.torch_module import TorchClassifier
from recipes import checkpoint
from recipes.account import Compression
from recipes.checkpoint import Checkpoint, State
from recipes.distill.engine import distill
from recipes.distill.settings import DistillSettings
from recipes.images import ImageSet
from recipes.progress import Silent
from recipes.prune.engine import make_goal, prune
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import QuantizeSettings

Classifiers = Callable[[str], Classifier]
Run = Callable[[Path, Silent], Compression]
QDROP = {
    "unit": "block",
    "steps": 3,
    "batch": 5,
    "range_steps": 10,
    "rounding": "offset",
    "scale_rate": 1e-3,
    "bias_rate": 1e-2,
    "activation_rate": 1e-3,
    "activation_drop": 0.5,
    "input_drop": 0.5,
}


class Stopping(Silent):
    """Stops after a number of steps of one task, and keeps what is said."""

    def __init__(self, task: str = "", stop_after: float | None = None) -> None:
        self.wanted, self.stop_after = task, stop_after
        self.said: list[str] = []
        self.now, self.done = "", 0.0

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Stopping]:
        self.now, self.done = name, 0.0
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.done += steps
        if self.now == self.wanted and self.stop_after is not None and self.done > self.stop_after:
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(params=["layers", "blocks", "trained", "pruned", "taught"])
def work(
    request: pytest.FixtureRequest, classifier_of: Classifiers, calibration_images: ImageSet
) -> tuple[str, float, Run]:
    """Where to stop (a task, and steps of it), and a run."""
    model, images = classifier_of("plain"), calibration_images.take(11)

    def quantizing(**changes: object) -> Run:
        settings = QuantizeSettings.model_validate({**QDROP, **changes})
        return lambda output, progress: quantize(
            model, images, output, settings, 3, 4, seed=1, overwrite=True, progress=progress
        )

    def pruning(output: Path, progress: Silent) -> Compression:
        settings = PruneSettings(mask_steps=2, steps=2, batch=5)
        goal = make_goal("unstructured", 0.5)
        return prune(model, images, output, settings, goal, seed=1, overwrite=True, progress=progress)

    def teaching(output: Path, progress: Silent) -> Compression:
        settings = DistillSettings(steps=9, batch=4)
        student = classifier_of("inverted")
        return distill(model, student, images, output, settings, seed=1, overwrite=True, progress=progress)

    return {
        "layers": ("reconstructing", 14.0, quantizing(unit="layer")),
        "blocks": ("reconstructing", 14.0, quantizing()),
        "trained": ("training the whole network", 4.0, quantizing(train_steps=7, train_batch=4)),
        "pruned": ("reconstructing", 20.0, pruning),
        "taught": ("distilling", 5.0, teaching),
    }[request.param]


def test_a_run_that_was_interrupted_is_gone_on_with(
    work: tuple[str, float, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, steps, run = work
    whole = run(tmp_path / "whole.onnx", Stopping())
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    output = tmp_path / "o.onnx"
    with pytest.raises(KeyboardInterrupt):
        run(output, Stopping(task, steps))
    (left,) = tmp_path.glob("o.onnx*")
    assert left.name.endswith(".partial")
    again = Stopping()
    result = run(output, again)
    assert any("going on after" in said for said in again.said)
    assert output.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert result.blocks == whole.blocks
    assert result.layers == whole.layers
    assert sorted(tmp_path.iterdir()) == [output, tmp_path / "whole.onnx"]


@pytest.fixture
def fresh(module_of: Callable[[str], TorchClassifier], tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(seed: int = 0, model: str = "plain", bright: float = 0.0, seconds: float = 0.0) -> Checkpoint:
        images = ImageSet(torch.full((2, 1, 4, 4), bright))
        return Checkpoint(tmp_path / "o.onnx", "test", (module_of(model),), images, {"seed": seed}, seconds)

    return make


def test_what_was_put_down_is_taken_up(fresh: Callable[..., Checkpoint]) -> None:
    state = State({"a|b": torch.arange(6).view(2, 3).mT, "mask": torch.tensor([True, False])}, {"done": [1, "x"]})
    fresh().offer(lambda: state)
    found = fresh().find()
    assert found is not None
    assert found.numbers == {"done": [1, "x"]}
    assert found.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(found.tensors[name], state.tensors[name]) for name in state.tensors)
    fresh().remove()
    assert fresh().find() is None


@pytest.mark.parametrize("other", [{"seed": 1}, {"model": "residual"}, {"bright": 0.5}])
def test_another_run_is_left_aside(other: dict[str, object], fresh: Callable[..., Checkpoint]) -> None:
    fresh().offer(lambda: State({"a": torch.ones(1)}, {}))
    assert fresh().find() is not None
    assert fresh(**other).find() is None


def test_nothing_is_written_before_it_is_time(fresh: Callable[..., Checkpoint]) -> None:
    fresh(seconds=1000.0).offer(lambda: State({"a": torch.ones(1)}, {}))
    assert not fresh().path.exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_file_is_left_aside(content: bytes, fresh: Callable[..., Checkpoint]) -> None:
    fresh().path.write_bytes(content)
    assert fresh().find() is None


@pytest.mark.parametrize("act_bits", [None, 8])
def test_what_lies_on_disk_changes_no_byte(
    act_bits: int | None, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    contents = []
    for limit in (2.0, 1e-9):
        settings = QuantizeSettings.model_validate({**QDROP, "cache_limit": limit})
        output = tmp_path / f"{limit}.onnx"
        quantize(classifier_of("residual"), calibration_images.take(11), output, settings, 3, act_bits)
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]

"""Interrupted and gone on with: the file is that of a run that nobody interrupted, to the byte."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.targets import choose_target
from converters.torch_module import TorchClassifier
from recipes import checkpoint, memory
from recipes.account import Compression
from recipes.budget import Budget
from recipes.checkpoint import Checkpoint, State
from recipes.distill.engine import distill
from recipes.distill.settings import DistillSettings
from recipes.images import ImageSet
from recipes.pipeline import Request, pruning_then_quantizing
from recipes.progress import Silent
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PruneSettings
from recipes.quantize import activations, mixed, plan
from recipes.quantize.engine import quantize
from recipes.quantize.settings import QuantizeSettings
from recipes.validate import Gates

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
    "logit_share": 0.25,
}


class Stopping(Silent):
    """Stops after a number of steps of one task, and keeps what is said."""

    def __init__(self, task: str = "", stop_after: float | None = None) -> None:
        self.wanted, self.stop_after = task, stop_after
        self.said: list[str] = []
        self.now, self.done = "", 0.0

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Stopping]:
        around = self.now, self.done
        self.now, self.done = name, 0.0
        yield self
        self.now, self.done = around

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.done += steps
        if self.now == self.wanted and self.stop_after is not None and self.done > self.stop_after:
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        self.said.append(message)


def with_a_threshold(classifier: Classifier, folder: Path) -> Classifier:
    """The same with its logits masked by a comparison with constants, which no gradient reaches."""
    model = onnx.load(classifier.path)
    logits = model.graph.output[0].name
    last = next(node for node in model.graph.node if logits in node.output)
    last.output[list(last.output).index(logits)] = "before"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.full(10, -1e4, np.float32), "threshold"),
            numpy_helper.from_array(np.zeros((), np.float32), "nothing"),
        ]
    )
    model.graph.node.append(onnx.helper.make_node("Greater", ["before", "threshold"], ["large"]))
    model.graph.node.append(onnx.helper.make_node("Where", ["large", "before", "nothing"], [logits]))
    (folder / "models").mkdir()
    onnx.save(model, folder / "models" / "masked.onnx")
    return load_classifier(folder / "models" / "masked.onnx")


@pytest.fixture(params=["layers", "blocks", "integers", "trained", "pruned", "settled", "taught", "taught strange"])
def work(
    request: pytest.FixtureRequest, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> tuple[str, float, Run]:
    """Where to stop (a task, and steps of it), and a run."""
    model, images = classifier_of("plain"), calibration_images.take(11)

    def quantizing(**changes: object) -> Run:
        settings = QuantizeSettings.model_validate({**QDROP, **changes})
        return lambda output, progress: quantize(
            model, images, output, settings, 3, 4, seed=1, overwrite=True, progress=progress
        )

    def for_integer_kernels(output: Path, progress: Silent) -> Compression:
        """`inverted` has Clips, which bound the steps of quantizers."""
        settings, target = QuantizeSettings.model_validate(QDROP), choose_target("ort-cpu", None, 8)
        how = {"seed": 1, "overwrite": True, "progress": progress}
        return quantize(classifier_of("inverted"), images, output, settings, 8, 8, target, **how)

    def pruning(output: Path, progress: Silent) -> Compression:
        settings = PruneSettings(mask_steps=2, steps=2, batch=5, compensate=request.param == "settled")
        goal = make_goal("unstructured", 0.5)
        return prune(model, images, output, settings, goal, seed=1, overwrite=True, progress=progress)

    def teaching(student: Classifier) -> Run:
        settings = DistillSettings(steps=9, batch=4)
        return lambda output, progress: distill(
            model, student, images, output, settings, seed=1, overwrite=True, progress=progress
        )

    return {
        "layers": ("reconstructing", 14.0, quantizing(unit="layer")),
        "blocks": ("reconstructing", 14.0, quantizing()),
        "trained": ("training the whole network", 4.0, quantizing(train_steps=7, train_batch=4)),
        "pruned": ("reconstructing", 20.0, pruning),
        "settled": ("reconstructing", 20.0, pruning),
        "integers": ("reconstructing", 40.0, for_integer_kernels),
        "taught": ("distilling", 5.0, teaching(classifier_of("inverted"))),
        "taught strange": ("distilling", 5.0, teaching(with_a_threshold(classifier_of("plain"), tmp_path))),
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
    (left,) = tmp_path.glob("o.onnx.*.partial")
    assert left.stat().st_size > 0
    again = Stopping()
    result = run(output, again)
    assert any("going on after" in said for said in again.said)
    assert output.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert result.blocks == whole.blocks
    assert result.layers == whole.layers
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == [output, tmp_path / "whole.onnx"]


@pytest.mark.parametrize(("bits", "act_bits"), [(3, 3), (Budget("bits", 3), None), (Budget("bops", 9e7), 3)], ids=str)
def test_noise_is_measured_once(
    bits: int | Budget,
    act_bits: int | None,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes minutes for a large model, and an interrupted run has it already."""
    settings = QuantizeSettings.model_validate(QDROP)

    def run(output: Path, progress: Silent) -> Compression:
        images = calibration_images.take(6)
        return quantize(classifier_of("plain"), images, output, settings, bits, act_bits, progress=progress)

    whole = run(tmp_path / "whole.onnx", Stopping())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "o.onnx", Stopping("reconstructing", 1.0))
    for module in (mixed, plan):
        monkeypatch.setattr(module, "measure_noise", lambda *_: pytest.fail("measured twice"))
    for module in (mixed, activations):
        monkeypatch.setattr(module, "measure_inputs", lambda *_: pytest.fail("measured twice"))
    assert run(tmp_path / "o.onnx", Stopping()).layers == whole.layers
    assert (tmp_path / "o.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_budget_of_bytes_counts_what_the_file_says_of_itself(
    classifier_of: Callable[[str], Classifier], calibration_images: ImageSet, tmp_path: Path
) -> None:
    """Another recipe's name is another plan, which states of the first are not for."""
    settings = QuantizeSettings.model_validate(QDROP)

    def run(budget: Budget, said: str, progress: Silent) -> None:
        ask = (classifier_of("plain"), calibration_images.take(6), tmp_path / "o.onnx", settings, budget)
        quantize(*ask, progress=progress, provenance={"mixmix.recipe": said})

    for budget, states in ((Budget("size", 90e3), 2), (Budget("bits", 3), 3)):
        for said in "ab":
            with pytest.raises(KeyboardInterrupt):
                run(budget, said, Stopping("reconstructing", 1.0))
        assert len(list(tmp_path.glob("*.partial"))) == states


@pytest.fixture
def fresh(module_of: Callable[[str], TorchClassifier], tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(
        seed: int = 0, model: str = "plain", bright: float = 0.0, mean: float | None = None, seconds: float = 0.0
    ) -> Checkpoint:
        images, module = ImageSet(torch.full((2, 1, 4, 4), bright)), copy.copy(module_of(model))
        if mean is not None:
            module.spec = module.spec.model_copy(update={"mean": (mean,)})
        return Checkpoint(tmp_path / "o.onnx", "test", (module,), images, {"seed": seed}, seconds=seconds)

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


def test_what_was_measured_is_not_measured_again(fresh: Callable[..., Checkpoint]) -> None:
    """Before anything else was kept, and in every state from then on."""
    found, never = {"a": [0.1, 1 / 3]}, lambda: pytest.fail("measured twice")
    assert fresh().measured("noise", lambda: found) == found
    again = fresh()
    assert again.find() is None  # there is nothing to go on with yet
    assert again.measured("noise", never) == found
    again.offer(lambda: State({"a": torch.ones(1)}, {"done": 1}))
    last = fresh()
    assert last.measured("noise", never) == found
    state = last.find()
    assert state is not None
    assert state.numbers == {"done": 1}
    assert fresh(seed=1).measured("noise", lambda: "another run") == "another run"


@pytest.mark.parametrize("other", [{"seed": 1}, {"model": "residual"}, {"bright": 0.5}, {"mean": 0.25}])
def test_another_run_is_left_alone(other: dict[str, object], fresh: Callable[..., Checkpoint]) -> None:
    fresh().offer(lambda: State({"a": torch.ones(1)}, {}))
    assert fresh(**other).find() is None
    fresh(**other).offer(lambda: State({"a": torch.zeros(1)}, {}))
    fresh(**other).remove()
    found = fresh().find()
    assert found is not None
    assert found.tensors["a"] == 1


def test_a_state_that_cannot_be_written_is_said_and_the_run_goes_on(
    module_of: Callable[[str], TorchClassifier], unwritable: Path
) -> None:
    said: list[str] = []
    images = ImageSet(torch.zeros(2, 1, 4, 4))
    lost = Checkpoint(unwritable / "o.onnx", "test", (module_of("plain"),), images, {}, said.append, seconds=0.0)
    for _ in range(3):
        lost.offer(lambda: State({"a": torch.ones(1)}, {}))
    assert len(said) == 1
    assert "an interruption would lose this run" in said[0]


def test_nothing_is_written_before_it_is_time(fresh: Callable[..., Checkpoint]) -> None:
    fresh(seconds=1000.0).offer(lambda: State({"a": torch.ones(1)}, {}))
    assert not fresh().path.exists()


def test_what_takes_long_to_write_is_written_less_often(
    fresh: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("recipes.checkpoint.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("recipes.checkpoint.write_atomically", lambda *_: clock.__setitem__(0, clock[0] + 3))
    checkpoint, offered = fresh(seconds=20.0), []
    for second in range(200):
        clock[0] += 1
        if checkpoint.offer(lambda: State({"a": torch.ones(1)}, {})):
            offered.append(second)
    assert offered == [19, 79, 139, 199]  # 20 seconds, then 20 times the three that a write took


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


def test_both_parts_of_pruning_and_quantizing_clear_up(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    settings, quantizing = PruneSettings(mask_steps=1, steps=1, batch=5), QuantizeSettings.model_validate(QDROP)
    write = pruning_then_quantizing(settings, make_goal("unstructured", 0.5), quantizing, 4)
    request = Request(
        classifier=classifier_of("plain"),
        zoo=(),
        data=None,
        output=tmp_path / "o.onnx",
        recipe="",
        synth_recipe=None,
        effort="default",
        images=None,
        gates=Gates(),
        seed=0,
        device=torch.device("cpu"),
        overwrite=False,
        version="",
    )
    write.write(request, calibration_images.take(6), Silent())
    assert list(tmp_path.iterdir()) == [tmp_path / "o.onnx"]


def test_no_room_for_activations_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "_reserve", full)
    with pytest.raises(MixMixError, match=r"no room for 0\.0 GB of activations: name another with.*TMPDIR"):
        memory.rows_like(torch.zeros(2, 3), 10, 1e-12)


def test_an_interruption_keeps_the_blocks_that_were_done(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """Long before it is time to write."""
    settings, images = QuantizeSettings.model_validate(QDROP), calibration_images.take(6)
    ask = (classifier_of("plain"), images, tmp_path / "o.onnx", settings, 3)
    with pytest.raises(KeyboardInterrupt):
        quantize(*ask, progress=Stopping("reconstructing", 14.0))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    again = Stopping()
    quantize(*ask, progress=again)
    assert "going on after block 1, as what was done before is kept" in again.said
    assert list(tmp_path.iterdir()) == [tmp_path / "o.onnx"]


def test_pruning_does_not_measure_again(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings, images = PruneSettings(steps=2, batch=5, compensate=True), calibration_images.take(6)
    ask = (classifier_of("plain"), images, tmp_path / "o.onnx", settings, make_goal("unstructured", 0.5))
    with pytest.raises(KeyboardInterrupt):
        prune(*ask, progress=Stopping("reconstructing", 1.0))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    prune(*ask, progress=Stopping("measuring what each layer can give up", 0.0))
    assert list(tmp_path.iterdir()) == [tmp_path / "o.onnx"]

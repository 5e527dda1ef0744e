"""Pruning end to end on the embedded models: the file has the zeros it should, and the two stages pay."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from converters.channels import find_channels
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.torch_module import TorchClassifier
from converters.writeback import edited_classifier, prepare_for_pruning
from recipes import zoo
from recipes.account import Compression
from recipes.images import ImageSet, load_images
from recipes.inspect import inspect_model
from recipes.patterns import keep_largest
from recipes.prune.channels import Limits, channel_harm, choose_channels
from recipes.prune.engine import prune, prune_in_memory
from recipes.prune.goal import make_goal, output_path
from recipes.prune.masks import PrunedWeight
from recipes.prune.settings import PACKAGE, PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import QuantizeSettings
from recipes.settings import load_recipe
from recipes.validate import validate
from tests import models

Classifiers = Callable[[str], Classifier]
Pruner = Callable[..., Compression]


def recipe(method: str, steps: int, **changes: object) -> PruneSettings:
    """A shipped recipe that trains for `steps` steps in all."""
    budget = {
        "one-shot": {},
        "one-stage": {"steps": steps},
        "two-stage": {"mask_steps": steps // 2, "steps": steps // 2},
        "obs": {"mask_steps": steps // 2, "steps": steps // 2},
    }
    quick = {"batch": 16, "sensitive_images": 4}
    return load_recipe(PruneSettings, PACKAGE, method).model_copy(update={**budget[method], **quick, **changes})


@pytest.fixture(scope="session")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, classifier_of: Classifiers, calibration_images: ImageSet
) -> Pruner:
    """Prunings of embedded models on 16 images, each made once."""
    folder = tmp_path_factory.mktemp("pruned")

    @cache
    def make(model: str, method: str, pattern: str, sparsity: float | None, steps: int) -> Compression:
        output = folder / f"{model}.{method}.{pattern.replace(':', 'of')}.{sparsity}.{steps}.onnx"
        goal = make_goal(pattern, sparsity)
        return prune(classifier_of(model), calibration_images, output, recipe(method, steps), goal)

    def ask(
        model: str, method: str, pattern: str = "unstructured", sparsity: float | None = 0.6, steps: int = 8
    ) -> Compression:
        return make(model, method, pattern, None if pattern != "unstructured" else sparsity, steps)

    return ask


def layer_weights(path: Path) -> list[np.ndarray]:
    """Weights of the file's Conv, Gemm and MatMul nodes, read without the product's help."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [arrays[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in arrays]


def top1(path: Path, classifier: Classifier, images: ImageSet) -> float:
    (judged,) = validate(classifier, [load_classifier(path)], images, threads=1).candidates
    assert judged.top1 is not None
    return judged.top1


@pytest.mark.parametrize(
    ("model", "method"),
    [
        *((model, "obs") for model in ("inverted", "excite", "attention")),
        *(("attention", method) for method in ("one-shot", "one-stage", "two-stage")),
    ],
)
def test_the_file_has_the_zeros_of_the_account(model: str, method: str, pruned: Pruner) -> None:
    result = pruned(model, method)
    weights = layer_weights(result.output)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.size for weight in weights) == pytest.approx(0.6, abs=0.005)
    assert result.sparsity == pytest.approx(0.6, abs=0.005)
    assert [account.sparsity for account in result.layers] == pytest.approx([float((w == 0).mean()) for w in weights])
    assert result.written_difference < 1e-4
    onnx.checker.check_model(onnx.load(result.output), full_check=True)


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
def test_every_allocation_comes_to_the_sparsity_asked_for(
    allocation: str, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings = recipe("one-shot", 0, allocation=allocation)
    for sparsity in (0.3, 0.9):
        output = tmp_path / f"{sparsity}.onnx"
        result = prune(
            classifier_of("plain"), calibration_images, output, settings, make_goal("unstructured", sparsity)
        )
        assert result.sparsity == pytest.approx(sparsity, abs=0.003)
        assert max(layer.sparsity for layer in result.layers) <= settings.most + 0.01
        if allocation == "uniform":
            first, *others = (layer.sparsity for layer in result.layers)
            assert first == 0
            assert max(others) - min(others) < 0.01


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
def test_what_is_zero_already_counts(
    allocation: str, pruned: Pruner, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """A model with 60 % zeros, spread by another rule; and what was asked for already changes nothing."""
    sparse = load_classifier(pruned("plain", "one-shot", sparsity=0.6, steps=0).output)
    settings = recipe("one-shot", 0, allocation=allocation)
    for sparsity, expected in ((0.7, 0.7), (0.4, 0.6)):
        output, goal = tmp_path / f"{sparsity}.onnx", make_goal("unstructured", sparsity)
        result = prune(sparse, calibration_images, output, settings, goal)
        assert result.sparsity == pytest.approx(expected, abs=0.003)


def test_stages_beat_the_smallest_taken_out_and_optimal_brain_surgeon_beats_both(
    pruned: Pruner, classifier_of: Classifiers, judging_images: ImageSet
) -> None:
    """At 80 %: two stages better than one, one than none; `obs` far better without a step, best of all with some."""
    methods = (("one-shot", 24), ("one-stage", 24), ("two-stage", 24), ("obs", 0), ("obs", 24))
    results = [pruned("residual", method, sparsity=0.8, steps=steps) for method, steps in methods]
    files = [load_classifier(result.output) for result in results]
    judged = validate(classifier_of("residual"), files, judging_images, threads=1)
    plain, one, two, settled, both = (candidate.snr for candidate in judged.candidates)
    assert plain + 3 < one < two
    assert settled > plain + 4
    assert both > max(settled, two) + 0.5
    assert all(block.after < block.before for _, block in results[2].blocks[1:])


@pytest.mark.parametrize(("model", "without"), [("inverted", 7), ("plain", 1), ("attention", 1)])
def test_two_of_four(
    model: str, without: int, pruned: Pruner, classifier_of: Classifiers, judging_images: ImageSet
) -> None:
    result = pruned(model, "two-stage", "2:4", steps=12)
    groups = 0
    for weight in layer_weights(result.output):
        channels_last = np.moveaxis(weight, 1, -1) if weight.ndim == 4 else weight
        if weight.ndim == 2 and model == "attention" and weight.shape[1] != 10:
            continue  # MatMul weights lie the other way round; the account below has them
        if channels_last.shape[-1] % 4 == 0 and (channels_last == 0).any():
            rows = channels_last.reshape(-1, 4)
            assert ((rows != 0).sum(1) <= 2).all()
            groups += len(rows)
    assert groups or model == "attention"
    dense = [layer for layer in result.layers if layer.sparsity == 0]
    assert len(dense) == without
    assert all(layer.whole == "2:4 does not divide the input channels" for layer in dense)
    assert all(layer.sparsity == pytest.approx(0.5) for layer in result.layers if layer not in dense)
    before = top1(classifier_of(model).path, classifier_of(model), judging_images)
    assert top1(result.output, classifier_of(model), judging_images) > before - 0.08


def test_names_and_metadata_survive(pruned: Pruner, classifier_of: Classifiers) -> None:
    before, after = onnx.load(classifier_of("plain").path), onnx.load(pruned("plain", "one-shot").output)
    assert [v.name for v in after.graph.input] == [v.name for v in before.graph.input]
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    facts = {entry.key: entry.value for entry in after.metadata_props}
    assert "mixmix.prune" in facts
    assert {entry.key for entry in before.metadata_props} <= set(facts)
    assert after.opset_import[0].version == before.opset_import[0].version


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_of_both_layouts(trans_b: int, tmp_path: Path) -> None:
    classifier = load_classifier(models.write(models.gemm(trans_b=trans_b), tmp_path / "model.onnx"))
    pixels = torch.rand(16, *models.IMAGE[1:], generator=torch.Generator().manual_seed(0))
    result = prune(
        classifier, ImageSet(pixels), tmp_path / "o.onnx", recipe("two-stage", 8), make_goal("unstructured", 0.5)
    )
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    x = classifier.spec.to_input(pixels).contiguous().numpy()
    assert np.isfinite(Session(result.output, threads=1).run(x)[0]).all()


def test_the_same_seed_gives_the_same_file(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / f"{name}.onnx"
        goal = make_goal("unstructured", 0.5)
        prune(classifier_of("plain"), calibration_images, output, recipe("two-stage", 4), goal, seed=seed)
        files.append(output.read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("method", ["nearest", "brecq", "qdrop"])
def test_quantizing_keeps_the_zeros(
    method: str, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    goal, settings = make_goal("unstructured", 0.7), recipe("two-stage", 4)
    result = prune_in_memory(classifier_of("plain"), calibration_images, tmp_path / "q.onnx", settings, goal)
    assert not list(tmp_path.glob("*.onnx"))
    assert result.checkpoint is not None
    result.checkpoint.remove()
    assert not list(tmp_path.iterdir())
    steps = 0 if method == "nearest" else 4
    rounding = load_recipe(QuantizeSettings, "recipes.quantize", method, overrides=[f"steps={steps}"])
    written = quantize(result.classifier(), calibration_images, tmp_path / "q.onnx", rounding, 3)
    for before, after in zip(result.layers, written.layers, strict=True):
        assert after.sparsity >= before.sparsity
    assert written.sparsity >= result.sparsity > 0.69
    module = to_torch(load_classifier(tmp_path / "q.onnx"))
    zeros = [float((module.constant(layer.weight) == 0).float().mean()) for layer in module.layers()]
    assert zeros == pytest.approx([layer.sparsity for layer in written.layers])


class TestPrunedWeight:
    """The two stages on one weight."""

    def weight(self, **changes: object) -> PrunedWeight:
        w = torch.tensor([[4.0, -3.0, 2.0, -1.0]])
        return PrunedWeight(w, [lambda size: keep_largest(size, 0.5)], recipe("two-stage", 4, **changes))

    def test_at_first_the_smallest_are_zero(self) -> None:
        assert self.weight().tensor().tolist() == [[4, -3, 0, 0]]
        assert self.weight().groups() == []

    def test_a_removed_weight_can_come_back_in_the_first_stage(self) -> None:
        pruned = self.weight()
        pruned.soften()
        weight, mask = (group.tensors[0] for group in pruned.groups())
        for tensor in (weight, mask):
            tensor.requires_grad_(True)
        pruned.tensor().square().sum().backward()
        assert mask.grad is not None
        (pruned.tensor() - torch.tensor([[4.0, -3.0, 9.0, 0.0]])).square().sum().backward()
        assert float(mask.grad[0, 2]) < 0  # more of the mask is wanted where the weight is zero
        with torch.no_grad():
            mask[0, 2] = 3.0
        pruned.absorb()
        assert pruned.kept.tolist() == [[True, False, True, False]]
        assert pruned.tensor().tolist() == [[4, 0, 6, 0]]

    def test_the_second_stage_keeps_the_mask(self) -> None:
        pruned = self.weight()
        pruned.freeze()
        (group,) = pruned.groups()
        with torch.no_grad():
            group.tensors[0].add_(1.0)
        assert pruned.tensor().tolist() == [[5, -2, 0, 0]]
        pruned.harden()
        assert pruned.groups() == []
        assert pruned.tensor().tolist() == [[5, -2, 0, 0]]
        assert pruned.sparsity == 0.5

    @pytest.mark.parametrize("stages", [("soften", "absorb"), ()], ids=["two", "one"])
    def test_what_was_zero_before_stays_zero(self, stages: tuple[str, ...]) -> None:
        """Three zeros, and a choice of two to remove: one of them would be trained."""
        w = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
        pruned = PrunedWeight(w, [lambda size: keep_largest(size, 0.5)], recipe("two-stage", 4))
        for stage in stages:
            getattr(pruned, stage)()
        pruned.freeze()
        (group,) = pruned.groups()
        with torch.no_grad():
            group.tensors[0].add_(1.0)
        pruned.harden()
        assert pruned.tensor().tolist() == [[5, 0, 0, 0]]


@pytest.mark.parametrize(
    ("method", "pattern", "sparsity"),
    [
        ("one-stage", "unstructured", 0.75),
        ("two-stage", "2:4", None),
        ("obs", "unstructured", 0.75),
        ("obs", "2:4", None),
    ],
)
def test_pruning_a_sparse_model_fills_no_zero(
    method: str, pattern: str, sparsity: float | None, pruned: Pruner, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """Seven in ten weights are zero, in some layers more: less is asked of those, and more of others."""
    given = pruned("inverted", "one-stage", sparsity=0.7).output
    goal, settings = make_goal(pattern, sparsity), recipe(method, 8, allocation="uniform")
    prune(load_classifier(given), calibration_images, tmp_path / "o.onnx", settings, goal)
    before, after = layer_weights(given), layer_weights(tmp_path / "o.onnx")
    assert sum(int((weight == 0).sum()) for weight in before) > 10_000
    for old, new in zip(before, after, strict=True):
        assert not new[old == 0].any()
    assert any(not np.array_equal(old, new) for old, new in zip(before, after, strict=True))


def test_two_of_four_where_it_is_missed_least(
    classifier_of: Classifiers, calibration_images: ImageSet, judging_images: ImageSet, tmp_path: Path
) -> None:
    """A quarter of the weights gone by 2:4 in some layers: no fewer, hardly more, and far less noise than in all."""
    classifier, settings = classifier_of("inverted"), recipe("obs", 0)
    result = prune(classifier, calibration_images, tmp_path / "o.onnx", settings, make_goal("2:4", 0.25))
    assert 0.25 <= result.sparsity < 0.3
    by_reason: dict[str | None, set[float]] = {}
    for layer in result.layers:
        by_reason.setdefault(layer.whole, set()).add(round(layer.sparsity, 6))
    assert by_reason == {
        None: {0.5},
        "2:4 does not divide the input channels": {0.0},
        "missed more than others": {0.0},
    }
    everywhere = prune(classifier, calibration_images, tmp_path / "all.onnx", settings, make_goal("2:4", None))
    files = [load_classifier(written.output) for written in (result, everywhere)]
    some, all_of_them = validate(classifier, files, judging_images, threads=1).candidates
    assert some.snr > all_of_them.snr + 3


def test_output_names_of_budgets() -> None:
    """Weights, multiplications and time are not the same file."""
    goals = (make_goal("channel", 0.3), make_goal("channel", None, 0.7), make_goal("channel", None, latency=0.7))
    assert [output_path(Path("m.onnx"), goal).name for goal in goals] == ["m.c30.onnx", "m.m30.onnx", "m.t30.onnx"]


@pytest.mark.parametrize(
    ("pattern", "sparsity", "name"),
    [
        ("unstructured", 0.5, "m.s50.onnx"),
        ("unstructured", 0.875, "m.s87.5.onnx"),
        ("2:4", None, "m.2of4.onnx"),
        ("2:4", 0.5, "m.2of4.s50.onnx"),
        ("4:5", 0.2, "m.4of5.s20.onnx"),
        ("2:4", 0.3, "m.2of4.s30.onnx"),
        ("channel", 0.3, "m.c30.onnx"),
    ],
)
def test_output_names(pattern: str, sparsity: float | None, name: str) -> None:
    goal = make_goal(pattern, sparsity)
    assert output_path(Path("m.onnx"), goal).name == name
    assert output_path(Path("m.onnx"), goal, 8, 8).name == name.replace(".onnx", ".w8a8.onnx")


def test_a_sparsity_that_no_layer_can_take_is_refused(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    for allocation in ("uniform", "global", "sensitivity"):
        with pytest.raises(MixMixError, match="ask for less"):
            prune(
                classifier_of("plain"), calibration_images, tmp_path / "o.onnx",
                recipe("one-shot", 0, allocation=allocation, most=0.5), make_goal("unstructured", 0.6),
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "unit"), [("inverted", "macs"), ("residual", "weights"), ("attention", "macs"), ("attention", "weights")]
)
def test_whole_channels(
    model: str, unit: str, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """The budget is kept, and not by much more than asked; the file is smaller and computes what was trained."""
    goal = make_goal("channel", None, 0.7) if unit == "macs" else make_goal("channel", 0.3)
    output = tmp_path / "o.onnx"
    result = prune(classifier_of(model), calibration_images, output, recipe("obs", 8), goal)
    assert result.written_difference < 1e-4
    before, after = (inspect_model(classifier) for classifier in (classifier_of(model), load_classifier(output)))
    assert before.macs is not None
    assert after.macs is not None
    if unit == "macs":
        assert 0.65 < after.macs / before.macs <= 0.7
    else:
        weights_left = sum(layer.weights for layer in after.zeros) / sum(layer.weights for layer in before.zeros)
        assert 0.65 < weights_left <= 0.7
        assert result.sparsity == pytest.approx(1 - weights_left, abs=1e-3)
    assert after.sparsity < 0.01
    assert result.size_after < result.size_before
    onnx.checker.check_model(onnx.load(output), full_check=True)


def test_channels_that_matter_stay(
    classifier_of: Classifiers,
    judging_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the multiplications gone, forty steps: far better than the same channels drawn by lot."""
    goal, kept = make_goal("channel", None, 0.5), {}
    images = load_images(zoo.calibration_images_path(), 32)
    lot = np.random.default_rng(0)

    def drawn(*given: object) -> np.ndarray:
        return lot.random(len(channel_harm(*given)))  # type: ignore[arg-type]  # whatever the engine gives

    for name, harm in (("harm", channel_harm), ("lot", drawn)):
        output = tmp_path / f"{name}.onnx"
        monkeypatch.setattr("recipes.prune.choice.channel_harm", harm)
        prune(classifier_of("residual"), images, output, recipe("one-stage", 40), goal)
        kept[name] = top1(output, classifier_of("residual"), judging_images)
    assert kept["harm"] > kept["lot"] + 0.02
    assert kept["harm"] > 0.8


def test_a_model_without_removable_channels_is_refused(tmp_path: Path) -> None:
    classifier = load_classifier(models.write(models.gemm(trans_b=1), tmp_path / "model.onnx"))
    pixels = torch.rand(8, *models.IMAGE[1:])
    with pytest.raises(MixMixError, match="no channels that can be removed"):
        prune(classifier, ImageSet(pixels), tmp_path / "o.onnx", recipe("one-shot", 0), make_goal("channel", None, 0.5))
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("model", ["residual", "excite", "dense"])
def test_layers_keep_a_multiple_of_channels(
    model: str, multiple: int, module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    """Where any go; and the budget is kept, by less than what one bundle more would have saved."""
    prepared = prepare_for_pruning(module_of(model).classifier)
    module = to_torch(prepared)
    channels = find_channels(module)
    harm = channel_harm(module, channels, module.spec.to_input(calibration_images.pixels[:8]), 8)
    removed = choose_channels(module, channels, harm, "macs", 0.6, Limits(0.1, multiple))
    assert len(removed)
    for entry in channels.layers:
        gone = int(np.isin(entry.outputs, removed).sum())
        if gone and len(np.unique(entry.outputs)) == len(entry.outputs):
            wanted = next(
                m for m in (multiple, multiple // 2, multiple // 4, 1) if m <= max(1, len(entry.outputs) // 2)
            )
            assert (len(entry.outputs) - gone) % wanted == 0, entry.layer.name
    before = inspect_model(prepared).macs
    after = inspect_model(edited_classifier(prepared, channels.edits(removed, {}, module.constant))).macs
    assert before is not None
    assert after is not None
    assert 0.4 < after / before <= 0.6


def test_multiples_that_do_not_come_to_the_budget_are_said(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings = recipe("one-shot", 0).model_copy(update={"multiple": 4, "least_channels": 0.4})
    with pytest.raises(
        MixMixError,
        match=r"in multiples of 4 channels.*: give --macs 0\.22 or more, or allow any number with --set multiple=1",
    ):
        prune(classifier_of("residual"), calibration_images, tmp_path / "o", settings, make_goal("channel", None, 0.1))

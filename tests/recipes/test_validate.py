"""Figures by hand, gates at their limits, and each model fed as it wants to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.transformers import float16

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.edits import ActivationEdit
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.targets import UINT8
from converters.writeback import edited_classifier
from recipes.images import ImageSet
from recipes.validate import (
    FUSION_FLOOR,
    Candidate,
    Gates,
    Reference,
    Run,
    UnsettledError,
    Validation,
    _judge,
    _optimisations,
    _quantizes_activations,
    check_labels,
    decibels,
    divergence,
    validate,
)
from tests import models

Write = Callable[[onnx.ModelProto], Path]
GRAY = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "scale": 1.0}


@pytest.fixture
def images() -> ImageSet:
    """Seven images, an odd number."""
    return ImageSet(torch.rand(7, *models.IMAGE[1:], generator=torch.Generator().manual_seed(0)))


def named(path: Path, model: onnx.ModelProto, options: dict[str, object] | None = None) -> Classifier:
    return load_classifier(models.write(model, path), options)


def with_answers(right: int, of: int = 100) -> np.ndarray:
    """Logits of two classes whose first `right` rows say 0, the others 1."""
    said = (np.arange(of) >= right).astype(int)
    return np.eye(2)[said] * 3.0


def judged(right: int, gates: Gates, **logits: np.ndarray) -> Candidate:
    """A candidate with `right` of 100 answers right, held against 95."""
    reference = Reference(Path("r.onnx"), 0.95, None, 1, 1.0)
    fused = logits.get("fused", with_answers(right))
    plain = logits.get("plain", fused)
    classifier = load_classifier(EMBEDDED)
    labels = np.zeros(100, np.int64)
    return _judge(classifier, reference, with_answers(95), Run(fused, 0.5), Run(plain, 0.7), labels, 1.0, gates)


EMBEDDED = Path(__file__).parents[2] / "recipes" / "embedded" / "plain.onnx"


@pytest.mark.parametrize(
    ("gates", "right", "failed"),
    [
        (Gates(max_drop=0.01), 94, []),  # 0.95 - 0.94 is 0.010000000000000009
        (Gates(max_drop=0.01), 93, ["max-drop"]),
        (Gates(min_top1=0.94), 94, []),
        (Gates(min_top1=0.94), 93, ["min-top1"]),
        (Gates(min_agreement=0.99), 94, []),
        (Gates(min_agreement=0.99), 93, ["min-agreement"]),
        (Gates(0.5, 0.9, 0.9), 20, ["max-drop", "min-top1", "min-agreement"]),
    ],
)
def test_gates_at_their_limits(gates: Gates, right: int, failed: list[str]) -> None:
    assert judged(right, gates).failed == failed


def test_what_is_not_finite_fails() -> None:
    broken = with_answers(95)
    broken[3, 1] = np.nan
    assert "finite" in judged(95, Gates(), fused=broken).failed
    assert "finite" in judged(95, Gates(), plain=broken).failed


def test_optimisations_that_change_the_answer_fail() -> None:
    """By a quarter more noise than compression makes, or by half as much change; less is let pass."""
    answers = with_answers(95)
    plain = answers + 0.1
    assert judged(95, Gates(), plain=plain, fused=answers + 0.111).failed == []
    assert judged(95, Gates(), plain=plain, fused=answers + 0.113).failed == ["optimisations"]
    assert judged(95, Gates(), plain=plain, fused=answers + 0.031).failed == []
    assert judged(95, Gates(), plain=plain, fused=answers + 0.027).failed == ["optimisations"]
    assert judged(95, Gates(), plain=plain, fused=answers - 0.1).failed == ["optimisations"]


def test_quantized_activations_may_be_rounded_otherwise() -> None:
    """By no more noise, and no more change than two roundings that have nothing in common differ by."""
    answers, draw = with_answers(95), np.random.default_rng(0)

    def passes(plain: np.ndarray, fused: np.ndarray) -> bool:
        return _optimisations(answers, Run(fused, 0.5), Run(plain, 0.7), FUSION_FLOOR, rounding=True).passed

    plain, fused, more = (0.1 * draw.standard_normal(answers.shape) for _ in range(3))
    assert passes(answers + plain, answers + fused)
    assert passes(answers + plain, answers)
    assert not passes(answers + plain, answers + plain + more)
    assert not passes(answers + plain, answers - plain)
    assert not passes(answers + 0.1, answers + 0.113)


def test_what_quantizes_activations(classifier_of: Callable[[str], Classifier]) -> None:
    plain = classifier_of("plain")
    assert not _quantizes_activations(plain)
    edit = ActivationEdit(plain.input_name, 0.1, 0, 8, UINT8)
    assert _quantizes_activations(edited_classifier(plain, [edit]))


def test_figures_by_hand() -> None:
    one, other = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert divergence(one, other) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    sure = 100 * np.random.default_rng(0).standard_normal((50, 10))
    assert 0 <= divergence(sure, sure + 1e-9 * one.sum()) < 1e-9
    assert np.isnan(divergence(np.full((1, 2), np.nan), np.zeros((1, 2))))
    assert decibels(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]])) == pytest.approx(20)
    assert decibels(one, one) == np.inf


@pytest.mark.parametrize(
    ("low", "high", "offset", "wrong"), [(-1, 3, 0, -1), (0, 5, 0, 5), (0, 4, 1, 4), (-1, 4, 0, -1)]
)
def test_labels_that_are_no_classes(
    write: Write, images: ImageSet, low: int, high: int, offset: int, wrong: int
) -> None:
    classifier = load_classifier(write(models.conv()))
    classifier = replace(classifier, spec=classifier.spec.model_copy(update={"offset": offset}))
    labelled = replace(images, labels=torch.tensor([low, high]), label_kind="real")
    with pytest.raises(MixMixError, match=rf"label {wrong}, .*model\.onnx has 5 classes"):
        check_labels(labelled, models.CLASSES, classifier)
    check_labels(replace(labelled, labels=torch.tensor([0, 3])), models.CLASSES, classifier)


def test_folders_that_are_not_the_classes(write: Write, images: ImageSet) -> None:
    classifier = load_classifier(write(models.conv()))
    labelled = replace(images, labels=torch.tensor([0, 1]), label_kind="real", classes=2)
    with pytest.raises(MixMixError, match=r"2 folders, .* 5 classes.*: name each folder by its class index"):
        check_labels(labelled, models.CLASSES, classifier)
    check_labels(replace(labelled, classes=5), models.CLASSES, classifier)


def scaled(op: str, number: float) -> onnx.ModelProto:
    """The conv model behind one node of arithmetic on the image."""
    model = models.conv()
    model.graph.node[0].input[0] = "scaled"
    model.graph.node.insert(0, models.node(op, "image number", "scaled"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(number), "number"))
    return model


def agreement(result: Validation) -> tuple[float, float]:
    return result.candidates[0].agreement, result.candidates[0].snr


def test_a_model_that_says_how_it_is_fed_is_fed_so(tmp_path: Path, images: ImageSet) -> None:
    """The reference takes 0 to 1 and says so in options; the candidate divides by 255 in its graph."""
    reference = named(tmp_path / "a.onnx", models.conv(), dict(GRAY))
    candidate = named(tmp_path / "b.onnx", scaled("Div", 255.0))
    assert (candidate.spec.source, candidate.spec.scale) == ("detected", 255)
    assert agreement(validate(reference, [candidate], images))[1] > 80


def test_a_model_that_says_nothing_is_fed_as_the_reference(tmp_path: Path, images: ImageSet) -> None:
    reference = named(tmp_path / "a.onnx", models.conv(), dict(GRAY))
    candidate = named(tmp_path / "b.onnx", models.conv())
    assert candidate.spec.source == "assumed"
    assert agreement(validate(reference, [candidate], images)) == (1.0, np.inf)


@pytest.mark.parametrize("count", [7, 2])
def test_any_number_of_images_for_any_fixed_batch(tmp_path: Path, images: ImageSet, count: int) -> None:
    """The file takes four at a time."""
    images = images.take(count)
    model = models.conv(image=(4, *models.IMAGE[1:]))
    reference = named(tmp_path / "a.onnx", models.conv(), dict(GRAY))
    candidate = named(tmp_path / "b.onnx", model, dict(GRAY))
    assert candidate.fixed_batch == 4
    result = validate(reference, [candidate], images)
    assert agreement(result)[1] > 80
    assert result.images == count


@pytest.mark.parametrize(("own", "right"), [(None, 1.0), (0, 0.0), (1, 1.0)])
def test_a_background_class_that_a_file_does_not_mention_is_the_references(
    tmp_path: Path, images: ImageSet, own: int | None, right: float
) -> None:
    reference = named(tmp_path / "a.onnx", models.conv(), {**GRAY, "offset": 1})
    candidate = named(tmp_path / "b.onnx", models.conv(), {**GRAY, "offset": own})
    answers = to_torch(reference)(reference.spec.to_input(images.pixels)).argmax(1)
    kept = answers > 0
    assert kept.any()
    labelled = ImageSet(images.pixels[kept], answers[kept] - 1, "real")
    result = validate(reference, [candidate], labelled)
    assert result.reference.top1 == 1
    assert result.candidates[0].top1 == right


def test_open_sides_are_those_of_the_reference(tmp_path: Path, images: ImageSet) -> None:
    reference = named(tmp_path / "a.onnx", models.conv(), dict(GRAY))
    candidate = named(tmp_path / "b.onnx", models.conv(image=("batch", 3, "height", "width")))
    assert candidate.open_size
    assert not reference.open_size
    assert agreement(validate(reference, [candidate], images))[1] > 80


def test_channel_order_that_arithmetic_does_not_tell_is_the_references(tmp_path: Path, images: ImageSet) -> None:
    (tmp_path / "a.toml").write_text('[input]\nchannels = "bgr"\nmean = 0\nstd = 1\nscale = 255\n')
    reference = named(tmp_path / "a.onnx", scaled("Div", 255.0))
    candidate = named(tmp_path / "b.onnx", scaled("Div", 255.0))
    assert (reference.spec.channels, candidate.spec.channels) == ("bgr", "rgb")
    assert agreement(validate(reference, [candidate], images)) == (1.0, np.inf)


def test_models_of_two_tasks(tmp_path: Path, images: ImageSet) -> None:
    other = models.assemble(
        [models.node("Flatten", "image", "flat"), models.node("MatMul", "flat w", "logits")],
        {"w": models.weights(models.PIXELS, 7)},
        outputs={"logits": ("batch", 7)},
    )
    with pytest.raises(MixMixError, match=r"7 classes, .* has 5: give models of one task"):
        validate(named(tmp_path / "a.onnx", models.conv()), [named(tmp_path / "b.onnx", other)], images)


def test_sixteen_bits_are_rounded_otherwise_from_node_to_node(
    classifier_of: Callable[[str], Classifier], judging_images: ImageSet, tmp_path: Path
) -> None:
    """A right model of 16 bits passes; what its optimisations change is far above float32's rounding."""
    for name in ("excite", "residual"):
        model = float16.convert_float_to_float16(onnx.load(classifier_of(name).path))
        onnx.save(model, tmp_path / f"{name}.onnx")
        half = load_classifier(tmp_path / f"{name}.onnx")
        assert half.other_floats
        (candidate,) = validate(classifier_of(name), [half], judging_images, Gates(max_drop=0.01)).candidates
        assert candidate.failed == []


def sigmoid() -> onnx.ModelProto:
    """A closing Sigmoid."""
    model = models.softmax()
    node = model.graph.node[-1]
    node.op_type = "Sigmoid"
    del node.attribute[:]
    return model


def test_a_single_logit_is_that_of_the_second_of_two_classes(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers of one class would agree, whatever they are."""
    monkeypatch.setattr(models, "CLASSES", 1)
    monkeypatch.setattr(models, "LOGITS", ("batch", 1))
    reference = named(tmp_path / "a.onnx", sigmoid(), dict(GRAY))
    other = sigmoid()
    for tensor in other.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    opposite = named(tmp_path / "b.onnx", other, dict(GRAY))
    (candidate,) = validate(reference, [opposite], images, Gates(min_agreement=0.9)).candidates
    answers = Session(reference.path).run(reference.spec.to_input(images.pixels).numpy())[0]
    probability = np.asarray(answers, np.float64).ravel()
    assert candidate.agreement < 0.5
    assert "min-agreement" in candidate.failed
    log_odds = np.log(probability / (1 - probability))
    assert candidate.kl == pytest.approx(((2 * probability - 1) * log_odds).mean(), rel=1e-3)
    labelled = replace(images, labels=torch.from_numpy((probability > 0.5).astype(np.int64)), label_kind="real")
    assert validate(reference, [reference], labelled).reference.top1 == 1


def test_a_candidate_in_training_mode_is_not_judged_in_another(tmp_path: Path, images: ImageSet) -> None:
    model = models.batchnorm()
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
            node.output.extend(["running.mean", "running.variance"])
    training = named(tmp_path / "a.onnx", model, dict(GRAY))
    with pytest.raises(UnsettledError, match=r"a\.onnx is written in training mode"):
        validate(named(tmp_path / "b.onnx", models.batchnorm(), dict(GRAY)), [training], images)


def test_latency_is_that_of_an_image(tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.validate.Session.latency", lambda self, inputs: 2.0 * len(inputs))
    one = named(tmp_path / "a.onnx", models.conv(), dict(GRAY))
    four = named(tmp_path / "b.onnx", models.conv(image=(4, *models.IMAGE[1:])), dict(GRAY))
    result = validate(one, [four], images)
    assert (result.reference.latency_ms, result.candidates[0].latency_ms) == (2.0, 2.0)

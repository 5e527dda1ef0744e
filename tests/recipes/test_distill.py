"""Distillation end to end: a student that knows nothing learns, and what is written is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes.account import Compression
from recipes.distill.engine import BatchStatistics, distill, trainable, whole_batches
from recipes.distill.losses import likeness, likeness_loss
from recipes.distill.settings import PACKAGE, DistillSettings
from recipes.images import ImageSet
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNE
from recipes.prune.settings import PruneSettings
from recipes.settings import load_recipe
from recipes.training import divergence, mix_images
from recipes.validate import validate
from tests import models

Classifiers = Callable[[str], Classifier]


def recipe(steps: int = 4, **changes: object) -> DistillSettings:
    overrides = {"steps": steps, "batch": 16, **changes}
    return load_recipe(DistillSettings, PACKAGE, "default").model_copy(update=overrides)


def forgetful(path: Path, output: Path) -> Path:
    """The model at `path` with weights drawn anew, as its maker would begin: nothing of what it learned is left."""
    model = onnx.load(path)
    random = np.random.default_rng(0)
    norms = {
        name: index for n in model.graph.node if n.op_type == "BatchNormalization" for index, name in enumerate(n.input)
    }
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name in norms:
            fresh = np.full(array.shape, 1.0 if norms[tensor.name] in (1, 4) else 0.0)
        elif array.ndim > 1:
            fresh = random.normal(0, np.sqrt(2 / array[0].size), array.shape)
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(fresh.astype(array.dtype), tensor.name))
    onnx.save(model, output)
    return output


def top1(path: Path, classifier: Classifier, images: ImageSet) -> float:
    (judged,) = validate(classifier, [load_classifier(path)], images, threads=1).candidates
    assert judged.top1 is not None
    return judged.top1


@pytest.fixture(scope="module")
def taught(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> Compression:
    """A residual net that knew nothing, taught by the plain one for a few steps."""
    folder = tmp_path_factory.mktemp("distilled")
    student = load_classifier(forgetful(classifier_of("residual").path, folder / "student.onnx"))
    return distill(
        classifier_of("plain"), student, calibration_images, folder / "o.onnx", recipe(60, batch=16, mixing=0.5)
    )


def test_a_student_of_another_family_learns(
    taught: Compression, classifier_of: Classifiers, judging_images: ImageSet
) -> None:
    before = top1(taught.input, classifier_of("plain"), judging_images)
    after = top1(taught.output, classifier_of("plain"), judging_images)
    assert before < 0.25
    assert after > before + 0.2


def test_the_file_is_the_students_own(taught: Compression) -> None:
    before, after = onnx.load(taught.input), onnx.load(taught.output)
    assert [(n.op_type, list(n.output)) for n in after.graph.node if n.op_type != "Identity"] == [
        (n.op_type, list(n.output)) for n in before.graph.node if n.op_type != "Identity"
    ]
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    assert after.opset_import[0].version == before.opset_import[0].version
    assert "mixmix.distill" in {entry.key for entry in after.metadata_props}
    assert taught.written_difference < 1e-4
    assert all(layer.error > 0 for layer in taught.layers)
    assert load_classifier(taught.output).has_statistics


def test_statistics_are_those_of_the_images(taught: Compression, calibration_images: ImageSet) -> None:
    """The first BatchNorm's stored mean and variance, computed again from what it reads."""
    module = to_torch(load_classifier(taught.output))
    norm = module.batchnorms()[0]
    x = module.spec.to_input(calibration_images.pixels)
    read = module.segment([module.input_name], [norm.input])({module.input_name: x})[norm.input]
    torch.testing.assert_close(norm.mean, read.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.variance, read.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-4)


def test_without_statistics_batchnorm_stays_as_it_was(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    student = classifier_of("residual")
    distill(classifier_of("plain"), student, calibration_images, tmp_path / "o.onnx", recipe(statistics=False))
    before, after = (to_torch(model).batchnorms() for model in (student, load_classifier(tmp_path / "o.onnx")))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.mean, new.mean)
        assert torch.equal(old.variance, new.variance)


def test_a_pruned_student_keeps_its_zeros_and_recovers(
    classifier_of: Classifiers, calibration_images: ImageSet, judging_images: ImageSet, tmp_path: Path
) -> None:
    teacher, pruned = classifier_of("residual"), tmp_path / "pruned.onnx"
    one_shot = load_recipe(PruneSettings, PRUNE, "one-shot")
    before = prune(teacher, calibration_images, pruned, one_shot, make_goal("unstructured", 0.7))
    result = distill(teacher, load_classifier(pruned), calibration_images, tmp_path / "o.onnx", recipe(60, rate=1e-3))
    assert [layer.sparsity for layer in result.layers] == pytest.approx([layer.sparsity for layer in before.layers])
    assert top1(tmp_path / "o.onnx", teacher, judging_images) > top1(pruned, teacher, judging_images) + 0.1


def test_the_same_seed_gives_the_same_file(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / f"{name}.onnx"
        distill(classifier_of("residual"), classifier_of("plain"), calibration_images, output, recipe(2), seed=seed)
        files.append(output.read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("model", ["attention", "inverted", "inverted_folded", "excite"])
def test_what_is_trained(model: str, module_of: Callable[[str], TorchClassifier]) -> None:
    """Every weight, bias, scale and shift, and neither statistics nor sizes: each gets a gradient."""
    module = module_of(model)
    names = trainable(module)
    norms = [step for step in module.whole.steps if step.op == "BatchNormalization"]
    assert {layer.weight for layer in module.layers()} <= set(names)
    assert {name for step in norms for name in step.inputs[1:3]} <= set(names)
    assert not {name for step in norms for name in step.inputs[3:5]} & set(names)
    values = {name: module.constant(name).clone().requires_grad_(True) for name in names}
    x = torch.rand(4, *module.spec.to_input(torch.rand(1, 1, 28, 28)).shape[1:])
    module.whole({module.input_name: x}, values)[module.logits_name].square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in values.values())


def test_classes_are_numbered_and_named_as_the_teachers(small_images: ImageSet, tmp_path: Path) -> None:
    """And pixels taken as the student takes them."""
    path = models.write(models.conv(), tmp_path / "m.onnx")
    teacher = load_classifier(path, {"offset": 1, "labels": "animals", "mean": [0.1]})
    student = load_classifier(path, {"mean": [0.2]})
    distill(teacher, student, small_images, tmp_path / "o.onnx", recipe(2))
    assert load_classifier(tmp_path / "o.onnx").spec == student.spec.model_copy(
        update={"offset": 1, "labels": "animals", "source": "metadata"}
    )


def test_a_teacher_that_says_nothing_of_its_classes_leaves_the_students(small_images: ImageSet, tmp_path: Path) -> None:
    path = models.write(models.conv(), tmp_path / "m.onnx")
    student = load_classifier(path, {"offset": 1, "labels": "animals"})
    distill(load_classifier(path), student, small_images, tmp_path / "o.onnx", recipe(2))
    written = load_classifier(tmp_path / "o.onnx").spec
    assert (written.offset, written.labels) == (1, "animals")


def test_other_classes_are_refused(classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path) -> None:
    other = load_classifier(models.write(models.gemm(trans_b=1), tmp_path / "student.onnx"))
    images = ImageSet(calibration_images.pixels.expand(-1, 3, -1, -1))
    with pytest.raises(MixMixError, match=f"has 10 classes and .* has {models.CLASSES}"):
        distill(classifier_of("plain"), other, images, tmp_path / "o.onnx", recipe())
    assert not (tmp_path / "o.onnx").exists()


def test_tensors_that_an_exporter_merged_are_trained_apart(calibration_images: ImageSet, tmp_path: Path) -> None:
    """Two BatchNorms read the same four initializers, two sums the same constant."""
    nodes = [
        models.node("Conv", "image a.weight", "a", pads=[1, 1, 1, 1]),
        models.batchnorm_node("a", "b"),
        models.node("Add", "b shift", "c"),
        models.node("Conv", "c c.weight", "d", pads=[1, 1, 1, 1]),
        models.batchnorm_node("d", "e"),
        models.node("Add", "e shift", "f"),
    ]
    tensors = {
        "a.weight": models.weights(4, models.CHANNELS, 3, 3),
        "c.weight": models.weights(4, 4, 3, 3, seed=1),
        "shift": models.weights(1, 4, 1, 1),
        **models.statistics(4),
        **models.head_tensors(4),
    }
    path = models.write(models.assemble(nodes + models.head("f"), tensors), tmp_path / "student.onnx")
    teacher = load_classifier(models.write(models.conv(), tmp_path / "teacher.onnx"))
    pixels = calibration_images.pixels[:, :, : models.SIDE, : models.SIDE].expand(-1, models.CHANNELS, -1, -1)
    result = distill(teacher, load_classifier(path), ImageSet(pixels), tmp_path / "o.onnx", recipe(8))
    assert result.written_difference < 1e-4
    first, second = to_torch(load_classifier(tmp_path / "o.onnx")).batchnorms()
    assert not torch.equal(first.mean, second.mean)


def test_a_mask_of_infinities_stays_and_is_no_divergence(small_images: ImageSet, tmp_path: Path) -> None:
    """A mask on scores, -inf where nothing may be looked at."""
    mask = np.zeros((4, 4), np.float32)
    mask[np.triu_indices(4, 1)] = -np.inf
    nodes = [
        models.node("Conv", "image conv.weight", "features"),
        models.node("Reshape", "features rows", "queries"),
        models.node("Transpose", "queries", "keys", perm=[0, 2, 1]),
        models.node("MatMul", "queries keys", "scores"),
        models.node("Add", "scores mask", "masked"),
        models.node("Softmax", "masked", "attention", axis=-1),
        models.node("MatMul", "attention queries", "mixed"),
        models.node("Flatten", "mixed", "flat"),
        models.node("Gemm", "flat head.weight", "logits", transB=1),
    ]
    tensors = {
        "conv.weight": models.weights(4, models.CHANNELS, 3, 3),
        "rows": np.array([0, 4, 36]),
        "mask": mask,
        "head.weight": models.weights(models.CLASSES, 144),
    }
    student = load_classifier(models.write(models.assemble(nodes, tensors), tmp_path / "student.onnx"))
    teacher = load_classifier(models.write(models.conv(), tmp_path / "teacher.onnx"))
    result = distill(teacher, student, small_images, tmp_path / "o.onnx", recipe())
    after = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "o.onnx").graph.initializer]
    assert any(np.array_equal(array, mask) for array in after)
    assert all(layer.error > 0 for layer in result.layers)


def test_a_batchnorm_on_pixels_stays_as_it_was(small_images: ImageSet, tmp_path: Path) -> None:
    """The first BatchNormalization normalises the image, the second is the first layer's."""
    first = {
        key.replace("bn", "image", 1): np.exp(0.1 * models.random(models.CHANNELS, seed=index))
        for index, key in enumerate(models.statistics(1))
    }
    nodes = [
        models.node("BatchNormalization", f"image {' '.join(first)}", "pixels"),
        models.node("Conv", "pixels conv.weight", "features"),
        models.batchnorm_node("features", "normed"),
        *models.head("normed"),
    ]
    tensors = {"conv.weight": models.weights(4, models.CHANNELS, 3, 3), **models.statistics(4), **first}
    model = models.assemble(nodes, tensors | models.head_tensors(4))
    student = load_classifier(models.write(model, tmp_path / "student.onnx"))
    teacher = load_classifier(models.write(models.conv(), tmp_path / "teacher.onnx"))
    result = distill(teacher, student, small_images, tmp_path / "o.onnx", recipe())
    assert result.written_difference < 1e-4
    after = onnx.load(tmp_path / "o.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.initializer}
    of_pixels, of_layer = (n for n in after.node if n.op_type == "BatchNormalization")
    for name, value in zip(of_pixels.input[1:], first.values(), strict=True):
        np.testing.assert_array_equal(arrays[name], value)
    for name, value in zip(of_layer.input[1:], models.statistics(4).values(), strict=True):
        assert not np.array_equal(arrays[name], value)


def test_one_image_is_refused(classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path) -> None:
    one = ImageSet(calibration_images.pixels[:1])
    with pytest.raises(MixMixError, match="at least 2"):
        distill(classifier_of("plain"), classifier_of("residual"), one, tmp_path / "o.onnx", recipe())


def test_a_rate_that_explodes_is_said(classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MixMixError, match="diverged: lower its rate"):
        distill(
            classifier_of("plain"), classifier_of("residual"), calibration_images, tmp_path / "o.onnx",
            recipe(20, rate=1e20, statistics=False),
        )  # fmt: skip
    assert not (tmp_path / "o.onnx").exists()


class TestLosses:
    """Formulas against independent ones."""

    def test_divergence(self) -> None:
        student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
        p, q = F.softmax(teacher / 3, 1), F.softmax(student / 3, 1)
        expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
        torch.testing.assert_close(divergence(student, teacher, 3.0), expected)
        assert float(divergence(teacher, teacher + 1, 3.0)) == pytest.approx(0, abs=1e-6)

    def test_likeness_is_blind_to_scale_and_width(self) -> None:
        features = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        wide = torch.cat([features, features], 1) * 5
        torch.testing.assert_close(likeness(features), likeness(wide))
        assert float(likeness_loss(features, wide)) == pytest.approx(0, abs=1e-10)
        assert likeness(features).diagonal().tolist() == pytest.approx([1.0] * 4)

    def test_mixing_blends_with_a_partner(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2)
        assert torch.equal(mix_images(pixels, 0.0, generator), pixels)
        mixed = mix_images(pixels, 1.0, generator)
        assert float(mixed.min()) >= 0
        assert float(mixed.max()) <= 5
        assert torch.equal(mixed, mixed[:, :, :1, :1].expand_as(mixed))
        assert not torch.equal(mixed, pixels)


def test_batch_statistics_normalise_by_the_batch_and_gather_without_gradients() -> None:
    norm = BatchStatistics(1e-5)
    x: Tensor = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1
    scale, bias, stored = torch.ones(3), torch.zeros(3), torch.full((3,), 9.0)
    y = norm(x, scale, bias, stored, stored)
    assert norm.sums is None
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), rtol=1e-3, atol=0)
    with torch.no_grad():
        norm(x, scale, bias, stored, stored)
        norm(x[:2] + 2, scale, bias, stored, stored)
    mean, variance = norm.gathered()
    everything = torch.cat([x, x[:2] + 2])
    torch.testing.assert_close(mean, everything.mean((0, 2, 3)))
    torch.testing.assert_close(variance, everything.var((0, 2, 3), correction=0))


@pytest.mark.parametrize(
    ("count", "sizes"), [(65, [65]), (128, [64, 64]), (159, [64, 95]), (160, [64, 64, 32]), (3, [3]), (1, [1])]
)
def test_a_small_rest_is_no_batch_of_its_own(count: int, sizes: list[int]) -> None:
    parts = whole_batches(torch.arange(count), 64)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(count))

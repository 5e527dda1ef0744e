"""Files for a runtime's integer kernels: what they hold, what runs, and that it is what was computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from converters.classifier import Classifier
from converters.layer_values import saturating_layers
from converters.load import load_classifier
from converters.runtime import Session
from converters.targets import choose_target
from recipes.account import Compression
from recipes.images import ImageSet
from recipes.quantize.engine import quantize
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.tables import Quantizers
from recipes.validate import Verdict, _explained, decibels, validate
from tests import hard_cases, models
from tests.recipes.test_quantize import Written, noise, recipe, run, top1

Classifiers = Callable[[str], Classifier]
Quantizer = Callable[..., Compression]
MODELS = ("plain", "residual", "inverted", "dense", "excite", "shuffle", "attention")


@pytest.fixture(scope="session")
def made_for(
    tmp_path_factory: pytest.TempPathFactory, classifier_of: Classifiers, calibration_images: ImageSet
) -> Quantizer:
    """Quantizations of embedded models for a target on 16 images, each made once."""
    folder = tmp_path_factory.mktemp("targets")

    @cache
    def make(model: str, target: str, bits: int, act_bits: int | None, method: str) -> Compression:
        output = folder / f"{model}.{target}.{bits}.{act_bits}.{method}.onnx"
        chosen = choose_target(target, None, act_bits)
        return quantize(classifier_of(model), calibration_images, output, recipe(method), bits, act_bits, chosen)

    def ask(model: str, target: str, bits: int, act_bits: int | None = 8, method: str = "nearest") -> Compression:
        return make(model, target, bits, act_bits, method)

    return ask


@pytest.mark.parametrize(("model", "bits"), [*((model, 8) for model in MODELS), ("inverted", 4), ("dense", 4)])
def test_every_layer_runs_in_integers_as_forecast(
    model: str, bits: int, made_for: Quantizer, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    """And optimised or not, the file gives the same logits but for values between two steps."""
    result, classifier = made_for(model, "ort-cpu", bits), classifier_of(model)
    fusion = result.fusion
    assert fusion is not None
    assert fusion.layers == len(result.layers)
    assert fusion.counted == fusion.forecast == fusion.layers, fusion.operators
    fused, plain = (run(result.output, classifier, calibration_images.pixels, optimise=how) for how in (True, False))
    reference = run(classifier.path, classifier, calibration_images.pixels)
    compression = float(np.square(plain.astype(np.float64) - reference).sum())
    assert float(np.square(fused.astype(np.float64) - plain).sum()) < 0.1 * compression


@pytest.mark.parametrize("case", ["tensorflow", "paddlepaddle"])
def test_what_other_exporters_write_runs_in_integers(case: str, tmp_path: Path) -> None:
    """Nothing but the image and the logits is in float, of what computes."""
    classifier = load_classifier(models.write(hard_cases.CASES[case](), tmp_path / "model.onnx"))
    output, target = tmp_path / "q.onnx", choose_target("ort-cpu", None, 8)
    fusion = quantize(classifier, noise(), output, recipe("nearest"), 8, 8, target).fusion
    assert fusion is not None
    assert fusion.counted == fusion.forecast == fusion.layers, fusion.operators
    assert not {"Conv", "Gemm", "MatMul", "Mul", "Add", "Clip", "Pad"}.intersection(fusion.operators)


@pytest.mark.parametrize(
    ("model", "bits", "act_bits"),
    [*((model, 8, 8) for model in MODELS), *((m, 4, a) for m in ("inverted", "dense", "attention") for a in (8, 4))],
)
def test_portable_files_run_in_integers_as_forecast(model: str, bits: int, act_bits: int, made_for: Quantizer) -> None:
    fusion = made_for(model, "portable", bits, act_bits).fusion
    assert fusion is not None
    assert fusion.counted == fusion.forecast, fusion.operators


@pytest.mark.parametrize(
    ("model", "target"), [("attention", "portable"), ("attention", "ort-cpu"), ("residual", "ort-cpu")]
)
def test_activations_of_few_bits_run_in_integers_as_forecast(model: str, target: str, made_for: Quantizer) -> None:
    fusion = made_for(model, target, 8, 6).fusion
    assert fusion is not None
    assert 0 < fusion.counted == fusion.forecast, fusion.operators


def test_a_step_is_learned_by_the_first_layer_that_reads_it_alone(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer: a second one would move the grid that weights and bias of the first were rounded to."""
    seen: list[Quantizers] = []
    edits = Quantizers.edits
    monkeypatch.setattr(Quantizers, "edits", lambda quantizers: seen.append(quantizers) or edits(quantizers))
    how = (recipe("adaround"), 8, 8, choose_target("ort-cpu", None, 8))
    quantize(classifier_of("residual"), calibration_images, tmp_path / "o.onnx", *how)
    (found,) = seen
    read = [plan.layer.input for plan in found.plans]
    assert len(set(read)) < len(read)
    for plan in found.plans:
        bias = found.bias(plan.layer)
        assert bias is not None
        grid = found.values[plan.layer.input].scale * found.weights[plan.layer.weight].scale.flatten()
        steps = bias.value / grid
        assert float((steps - steps.round()).abs().max()) < 0.01


@pytest.mark.parametrize("model", ["residual", "inverted"])
def test_learned_ranges_still_fuse(model: str, made_for: Quantizer) -> None:
    """Training moves the steps, behind a Clip too."""
    fusion = made_for(model, "ort-cpu", 4, 8, "qdrop").fusion
    assert fusion is not None
    assert fusion.counted == fusion.layers, fusion.operators


def test_learned_ranges_still_fuse_in_portable_files(made_for: Quantizer) -> None:
    """Behind a Clip, which a step that reaches further would keep between two integer kernels."""
    fusion = made_for("inverted", "portable", 8, 8, "qdrop").fusion
    assert fusion is not None
    assert fusion.counted == fusion.forecast > 0, fusion.operators


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda", "tensorrt"])
def test_integers_are_what_the_runtime_wants(target: str, made_for: Quantizer) -> None:
    result = made_for("residual", target, 8)
    written = Written(result.output)
    for node in written.dequantized:
        integers, *zero = (written.arrays[name] for name in (node.input[0], *node.input[2:]))
        assert all(not z.any() for z in zero)
        if integers.dtype != np.int32:
            assert written.kinds[node.input[0]] == TensorProto.INT8
            limit = 64 if target == "ort-cpu" else 128
            assert -limit <= integers.min() < -limit // 2  # products with 8-bit activations do not saturate
            assert integers.max() < limit
    biases = [node for node in written.dequantized if written.kinds[node.input[0]] == TensorProto.INT32]
    assert len(biases) == (len(result.layers) if target == "ort-cpu" else 0)
    kind = TensorProto.INT8 if target == "tensorrt" else TensorProto.UINT8
    assert {written.kinds[node.input[2]] for node in written.quantized} == {kind}
    if target == "tensorrt":
        assert not any(written.arrays[node.input[2]].any() for node in written.quantized)


@pytest.mark.parametrize(("target", "bits", "act_bits"), [("portable", 8, 8), ("portable", 4, 4), ("ort-cpu", 8, 8)])
def test_sums_of_two_products_stay_within_sixteen_bits(
    target: str, bits: int, act_bits: int, made_for: Quantizer
) -> None:
    """Where there is no VNNI, onnxruntime's kernels add two products of UINT8 and INT8 in 16 bits (vpmaddubsw), and
    what is more saturates: so INT8 weights behind a quantized input have to stay small enough."""
    written = Written(made_for("inverted", target, bits, act_bits).output)
    names = [node.input[0] for node in written.dequantized]
    weights = [written.arrays[name] for name in names if written.kinds.get(name) == TensorProto.INT8]
    assert weights
    for integers in weights:
        assert 2 * 255 * np.abs(integers.astype(np.int64)).max() < 2**15


@pytest.mark.parametrize(
    ("target", "bits", "act_bits", "some"),
    [
        ("portable", 8, 8, False),
        ("portable", 8, None, False),
        ("portable", 8, 16, False),
        ("portable", 8, 4, False),
        ("ort-cpu", 8, 8, False),
        ("ort-cpu", 4, 8, False),
        ("tensorrt", 8, 8, True),
        ("ort-cuda", 8, 8, True),
    ],
)
def test_files_that_saturate_without_vnni_are_told_from_others(
    target: str, bits: int, act_bits: int | None, some: bool, made_for: Quantizer
) -> None:
    result = made_for("inverted", target, bits, act_bits)
    written = load_classifier(result.output)
    found = saturating_layers(written)
    assert len(found) == (len(result.layers) if some else 0)
    failed, passed = (Verdict("optimisations", passed, "it changes", 0.0) for passed in (False, True))
    assert _explained(passed, written) == passed
    explained = _explained(failed, written)
    assert explained.reason.startswith("it changes")
    assert (f"(layers: {len(found)}), which saturate" in explained.reason) == some
    assert not explained.passed


def test_a_file_that_fails_for_it_says_so(
    made_for: Quantizer,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With nothing let pass."""
    monkeypatch.setattr("recipes.validate.FUSION_SHARE", -1.0)
    monkeypatch.setattr("recipes.validate.FUSION_FLOOR", -1.0)
    written = load_classifier(made_for("inverted", "tensorrt", 8).output)
    (candidate,) = validate(classifier_of("inverted"), [written], calibration_images).candidates
    (reason,) = [verdict.reason for verdict in candidate.verdicts if not verdict.passed]
    assert "saturate on x86 processors without VNNI" in reason


def test_full_range_where_it_is_asked_for(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings = recipe("nearest", reduce_range=False)
    target = choose_target("ort-cpu", None, 8)
    result = quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", settings, 8, 8, target)
    assert {layer.bits for layer in result.layers} == {8}
    reduced = quantize(classifier_of("plain"), calibration_images, tmp_path / "r.onnx", recipe("nearest"), 8, 8, target)
    assert {layer.bits for layer in reduced.layers} == {7}
    assert all("VNNI" in str(layer.reason) for layer in reduced.layers)
    assert sum(layer.error for layer in result.layers) < sum(layer.error for layer in reduced.layers)


@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt"])
def test_other_targets_keep_the_accuracy(
    target: str, made_for: Quantizer, classifier_of: Classifiers, judging_images: ImageSet
) -> None:
    result, classifier = made_for("inverted", target, 8), classifier_of("inverted")
    assert result.fusion is None
    assert top1(result.output, classifier, judging_images) > top1(classifier.path, classifier, judging_images) - 0.02


def test_sixteen_bit_activations_are_nearer_than_eight(
    made_for: Quantizer, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    reference = run(classifier_of("inverted").path, classifier_of("inverted"), calibration_images.pixels)
    files = [made_for("inverted", "portable", 8, act_bits).output for act_bits in (8, 16, None)]
    noise = [
        decibels(reference.astype(np.float64), run(file, classifier_of("inverted"), calibration_images.pixels))
        for file in files
    ]
    assert noise[0] + 3 < noise[1] < noise[2] + 0.5
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(files[1]).graph.initializer}
    assert TensorProto.UINT16 in kinds.values()


def test_two_bit_storage_is_smaller_and_the_same(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings: QuantizeSettings = recipe("nearest", extra_share=0.0)  # the same bits, whatever the containers
    sizes, logits = [], []
    for container in ("int2", "int4", "int8"):
        output = tmp_path / f"{container}.onnx"
        target = choose_target("portable", container)
        result = quantize(classifier_of("plain"), calibration_images, output, settings, 2, target=target)
        sizes.append(result.size_after)
        logits.append(torch.from_numpy(run(output, classifier_of("plain"), calibration_images.pixels)))
    assert sizes[0] < 0.75 * sizes[1] < 0.6 * sizes[2]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "act_bits", "symmetric"), [(8, 8, True), (8, None, False), (4, 8, False)])
def test_zero_points_of_portable_files(bits: int, act_bits: int | None, symmetric: bool, made_for: Quantizer) -> None:
    """0 where an integer kernel may take the layer; elsewhere what rounds best."""
    result = made_for("plain", "portable", bits, act_bits)
    written = Written(result.output)
    zeros = [written.arrays[node.input[2]].astype(np.int32) for node in written.dequantized]
    inner = zeros[1:-1]
    assert all(not zero.any() for zero in inner) == symmetric
    if act_bits is not None:
        assert not zeros[0].any()  # the ends have 8 bits


@pytest.mark.parametrize("factor", [1e-5, 1e-9, 0.0])
@pytest.mark.parametrize("target", ["portable", "ort-cpu", "tensorrt"])
def test_a_channel_that_is_dead_beside_its_bias_does_not_overflow_it(
    target: str, factor: float, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """On the grid of its scale a bias may take more than 32 bits, which the runtime finds when it fuses."""
    model = onnx.load(classifier_of("plain").path)
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in convs:  # BatchNorm comes behind, so the bias of the dead channels is its
        weight = tensors[node.input[1]]
        values = numpy_helper.to_array(weight).copy()
        values[:4] *= factor
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            for index, first in ((2, 1.0), (3, 0.0)):
                tensor = tensors[node.input[index]]
                values = numpy_helper.to_array(tensor).copy()
                values[:4] = first
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    source = tmp_path / "dead.onnx"
    onnx.save(model, source)
    output = tmp_path / f"{target}.onnx"
    chosen = choose_target(target, None, 8)
    result = quantize(load_classifier(source), calibration_images, output, recipe("nearest"), 8, 8, chosen)
    assert result.fusion is None or result.fusion.counted == result.fusion.forecast
    x = classifier_of("plain").spec.to_input(calibration_images.pixels).numpy()
    fused, plain, reference = (
        session.run(x)[0]
        for session in (Session(output), Session(output, optimise=False), Session(source, optimise=False))
    )
    assert np.abs(fused - plain).max() < 0.05 * np.abs(reference).max()
    assert decibels(reference, fused) > 25
    if target == "ort-cpu":
        written = {node.input[2] for node in onnx.load(output).graph.node if node.op_type == "Conv"}
        assert all(name.endswith(".dequantized") for name in written)

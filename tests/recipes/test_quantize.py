"""Quantization end to end on the embedded models: what is written is what was meant, and reconstruction pays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from converters import writeback
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.targets import PORTABLE, choose_target
from recipes.account import Compression
from recipes.images import ImageSet
from recipes.quantize import primitives as q
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.validate import FUSION_SHARE, decibels
from tests import hard_cases, models

METHODS = ["nearest", "adaround", "brecq", "qdrop"]
Classifiers = Callable[[str], Classifier]
Quantizer = Callable[..., Compression]
Arrays = dict[str, NDArray[np.generic]]


def recipe(method: str, steps: int = 6, **changes: object) -> QuantizeSettings:
    """A shipped recipe with a budget for tests."""
    settings = load_recipe(QuantizeSettings, PACKAGE, method)
    steps = steps if settings.unit != "none" else 0
    return settings.model_copy(
        update={"steps": steps, "batch": 16, "range_steps": 20, "sensitive_images": 4, **changes}
    )


@pytest.fixture(scope="session")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, classifier_of: Classifiers, calibration_images: ImageSet
) -> Quantizer:
    """Quantizations of embedded models on 16 images, each made once."""
    folder = tmp_path_factory.mktemp("quantized")

    @cache
    def make(model: str, method: str, bits: int, act_bits: int | None, steps: int, extra_share: float) -> Compression:
        output = folder / f"{model}.{method}.{bits}.{act_bits}.{steps}.{extra_share}.onnx"
        settings = recipe(method, steps, extra_share=extra_share)
        return quantize(classifier_of(model), calibration_images, output, settings, bits, act_bits)

    def ask(
        model: str, method: str, bits: int, act_bits: int | None = None, steps: int = 6, extra_share: float = 0.1
    ) -> Compression:
        return make(model, method, bits, act_bits, steps, extra_share)

    return ask


class Written:
    """A quantized file, taken apart without the product's help."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        graph = self.model.graph
        self.kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.arrays: Arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.reader = {name: node for node in graph.node for name in node.input}
        self.dequantized = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in self.arrays]
        self.quantized = [n for n in graph.node if n.op_type == "QuantizeLinear"]
        clips = [n for n in graph.node if n.op_type == "Clip" and all(name in self.arrays for name in n.input[1:])]
        self.clips = {node.output[0]: node for node in clips}

    def integers(self, output: str) -> tuple[NDArray[np.generic], int]:
        """The stored weight of the layer that writes `output`, and its data type."""
        node = next(node for node in self.dequantized if self.reader[node.output[0]].output[0] == output)
        return self.arrays[node.input[0]].astype(np.int32), self.kinds[node.input[0]]

    def weight(self, output: str) -> torch.Tensor:
        node = next(node for node in self.dequantized if self.reader[node.output[0]].output[0] == output)
        integers, scale, zero = (self.arrays[name].astype(np.float32) for name in node.input)
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        shape = [-1 if index == axis else 1 for index in range(integers.ndim)]
        return torch.from_numpy((integers - zero.reshape(shape)) * scale.reshape(shape))

    def activations(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
        """Scale, zero point and bits by the name of the quantized value.

        The bits are those of the type, or those that a Clip to constants before QuantizeLinear leaves of it.
        """
        found = {}
        for node in self.quantized:
            scale, zero = (self.arrays[name].astype(np.float32) for name in node.input[1:3])
            value, bits = node.input[0], {TensorProto.UINT8: 8, TensorProto.UINT4: 4}[self.kinds[node.input[2]]]
            if value in self.clips:
                low, high = (float(self.arrays[name]) for name in self.clips[value].input[1:3])
                if round(low / float(scale)) == -int(zero) and (high - low) / float(scale) < 2**bits - 1.5:
                    value, bits = self.clips[value].input[0], round(np.log2((high - low) / float(scale) + 1))
            found[value] = torch.from_numpy(scale), torch.from_numpy(zero), bits
        return found

    def dequantized_activations(self, x: NDArray[np.float32]) -> dict[str, torch.Tensor]:
        """What onnxruntime, without optimisations, makes of each quantized value on model inputs, by its name."""
        if not self.quantized:
            return {}
        model, behind = onnx.ModelProto(), {node.output[0]: self.reader[node.output[0]] for node in self.quantized}
        model.CopyFrom(self.model)
        names = dict(
            zip(self.activations(), (behind[node.output[0]].output[0] for node in self.quantized), strict=True)
        )
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(list(names.values()), {session.get_inputs()[0].name: x})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def simulate(
    written: Written, classifier: Classifier, inputs: torch.Tensor
) -> tuple[NDArray[np.float32], dict[str, torch.Tensor]]:
    """Logits of the float model in torch with the file's weights, biases and activation grids put in.

    Each quantized value goes on as onnxruntime has it, and how far that is from what was computed here, in steps, is
    the second thing: float noise takes some over a boundary between two steps, and that would carry on.
    """
    module = to_torch(writeback.prepare_for_quantization(classifier, PORTABLE, 4))
    parameters, transforms = {}, {}
    for layer in module.layers():
        parameters[layer.weight] = written.weight(layer.output)
        node = next(n for n in written.reader.values() if n.output[0] == layer.output)
        if layer.bias is not None:
            parameters[layer.bias] = torch.from_numpy(written.arrays[node.input[2]].copy())
    apart = {}
    there = written.dequantized_activations(inputs.numpy())
    for name, (scale, zero, bits) in written.activations().items():

        def hold(
            x: torch.Tensor, name: str = name, scale: torch.Tensor = scale, zero: torch.Tensor = zero, bits: int = bits
        ) -> torch.Tensor:
            apart[name] = (q.fake_quantize(x, scale, zero, 0, 2**bits - 1) - there[name]).abs() / scale
            return there[name]

        transforms[name] = hold
    logits = module.whole({module.input_name: inputs}, parameters, transforms)[module.logits_name].numpy()
    assert apart.keys() == there.keys()
    return logits, apart


def run(path: Path, classifier: Classifier, pixels: torch.Tensor, *, optimise: bool = True) -> NDArray[np.float32]:
    inputs = classifier.spec.to_input(pixels).contiguous().numpy()
    return np.asarray(Session(path, optimise=optimise, threads=1).run(inputs)[0], np.float32)


def top1(path: Path, classifier: Classifier, images: ImageSet) -> float:
    assert images.labels is not None
    return float((run(path, classifier, images.pixels).argmax(1) == images.labels.numpy()).mean())


def assert_the_file_is_the_simulation(result: Compression, classifier: Classifier, images: ImageSet) -> None:
    inputs = classifier.spec.to_input(images.pixels[:16]).contiguous()
    expected, apart = simulate(Written(result.output), classifier, inputs)
    actual = run(result.output, classifier, images.pixels[:16], optimise=False)
    assert float(np.abs(actual - expected).max() / np.abs(expected).max()) < 1e-4
    assert bool(apart) == (result.act_bits is not None)
    for steps in apart.values():
        assert float(steps.max()) < 1.5
        assert int((steps > 0.5).sum()) <= max(1, 1e-3 * steps.numel())


@pytest.mark.parametrize(
    ("model", "method", "bits", "act_bits"),
    [
        *(("plain", method, *width) for method in METHODS for width in ((2, None), (4, 4))),
        *(("inverted", "qdrop", *width) for width in ((2, None), (4, None), (4, 8))),
        *(("inverted", method, 4, 4) for method in METHODS),
    ],
)
def test_the_file_computes_what_was_simulated(
    model: str,
    method: str,
    bits: int,
    act_bits: int | None,
    quantized: Quantizer,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
) -> None:
    result, classifier = quantized(model, method, bits, act_bits), classifier_of(model)
    assert_the_file_is_the_simulation(result, classifier, calibration_images)
    assert result.written_difference < (1e-4 if act_bits is None else 0.05)
    if act_bits is None:  # optimised, too: onnxruntime computes convolutions of 4-bit weights as floats
        plain, fused = (
            run(result.output, classifier, calibration_images.pixels, optimise=how) for how in (False, True)
        )
        np.testing.assert_allclose(fused, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("model", ["inverted_folded", "residual", "shuffle", "excite"])
def test_every_family_can_be_quantized_with_its_activations(
    model: str, quantized: Quantizer, classifier_of: Classifiers, calibration_images: ImageSet, judging_images: ImageSet
) -> None:
    result = quantized(model, "nearest", 8, 8)
    assert_the_file_is_the_simulation(result, classifier_of(model), calibration_images)
    before = top1(classifier_of(model).path, classifier_of(model), judging_images)
    assert top1(result.output, classifier_of(model), judging_images) > before - 0.02


@pytest.mark.parametrize("model", ["plain", "residual"])
def test_four_bit_activations_behind_a_relu(
    model: str, quantized: Quantizer, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    result, classifier = quantized(model, "brecq", 4, 4), classifier_of(model)
    assert_the_file_is_the_simulation(result, classifier, calibration_images)
    fused, plain = (run(result.output, classifier, calibration_images.pixels, optimise=how) for how in (True, False))
    noise = plain - run(classifier.path, classifier, calibration_images.pixels)
    assert float(np.square(fused - plain).sum()) < FUSION_SHARE * float(np.square(noise).sum())


@pytest.mark.parametrize("act_bits", [2, 3, 4, 6, 8])
def test_activations_in_the_file_stay_within_their_bits(
    act_bits: int, quantized: Quantizer, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """Whatever the type of the file could hold, counted on images twice as bright as any that was calibrated on."""
    result = quantized("plain", "nearest", 4, act_bits)
    model = onnx.load(result.output)
    inner = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"][1:-1]
    for name in inner:  # integers are made visible as floats
        model.graph.node.append(onnx.helper.make_node("Cast", [name], [f"{name}.shown"], to=TensorProto.FLOAT))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.shown", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "shown.onnx")
    inputs = 2 * classifier_of("plain").spec.to_input(calibration_images.pixels).contiguous().numpy()
    _, *integers = Session(tmp_path / "shown.onnx", optimise=False).run(inputs)
    assert len(integers) == 5
    widths = [layer.act_bits or 0 for layer in result.layers[1:-1]]
    assert min(widths) == act_bits
    assert [float(values.max()) for values in integers] == [2**width - 1 for width in widths]


def test_eight_bit_weights_with_four_bit_activations(
    quantized: Quantizer, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    result = quantized("plain", "nearest", 8, 4)
    assert_the_file_is_the_simulation(result, classifier_of("plain"), calibration_images)


@pytest.mark.parametrize(
    ("method", "bits", "act_bits"), [("nearest", 2, None), ("nearest", 4, 4), ("qdrop", 4, None), ("qdrop", 4, 8)]
)
def test_types_and_ranges_in_the_file_are_those_of_the_account(
    method: str, bits: int, act_bits: int | None, quantized: Quantizer, classifier_of: Classifiers
) -> None:
    result = quantized("inverted", method, bits, act_bits)
    module = to_torch(writeback.prepare_for_quantization(classifier_of("inverted"), PORTABLE, 4), check=False)
    written, layers = Written(result.output), module.layers()
    assert [account.name for account in result.layers] == [layer.name for layer in layers]
    added = sum((account.bits - bits) * account.weights for account in result.layers)
    assert 0 < added <= 0.1 * (8 - bits) * sum(account.weights for account in result.layers)
    widths: dict[str, int] = {}
    for layer, account in zip(layers, result.layers, strict=True):
        integers, kind = written.integers(layer.output)
        assert kind == (TensorProto.INT4 if account.bits <= 4 else TensorProto.INT8)
        assert integers.shape == layer.shape
        assert -(2 ** (account.bits - 1)) <= integers.min()
        assert integers.max() <= 2 ** (account.bits - 1) - 1
        assert integers.max() - integers.min() > 2 ** (account.bits - 1)  # and the range is used
        assert account.bits >= bits
        assert account.bits == bits or account.reason
        assert (account.act_bits is None) == (act_bits is None)
        if account.act_bits is not None:
            widths[layer.input] = max(widths.get(layer.input, 0), account.act_bits)
    assert {name: width for name, (_, _, width) in written.activations().items()} == widths
    assert act_bits is None or (widths[layers[0].input], widths[layers[-1].input]) == (8, 8)
    assert result.size_after == result.output.stat().st_size < result.size_before / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [models.matmul, lambda: models.gemm(trans_b=0), lambda: models.gemm(trans_b=1)])
def test_the_scales_follow_the_output_channels_of_every_layout(
    build: Callable[[], onnx.ModelProto], method: str, tmp_path: Path
) -> None:
    classifier = load_classifier(models.write(build(), tmp_path / "model.onnx"))
    side = models.SIDE
    pixels = torch.rand(16, models.CHANNELS, side, side, generator=torch.Generator().manual_seed(0))
    settings = recipe(method).model_copy(update={"extra_share": 0.0})
    result = quantize(classifier, ImageSet(pixels), tmp_path / "out.onnx", settings, 4)
    assert_the_file_is_the_simulation(result, classifier, ImageSet(pixels))
    (node,) = Written(result.output).dequantized
    assert Written(result.output).arrays[node.input[1]].shape == (models.CLASSES,)


def test_reconstruction_beats_nearest_by_far_at_two_bits(
    quantized: Quantizer, classifier_of: Classifiers, judging_images: ImageSet
) -> None:
    classifier = classifier_of("inverted")
    nearest = top1(quantized("inverted", "nearest", 2, extra_share=0.0).output, classifier, judging_images)
    for method, steps in (("brecq", 25), ("qdrop", 25), ("adaround", 12)):
        rebuilt = quantized("inverted", method, 2, steps=steps, extra_share=0.0)
        assert top1(rebuilt.output, classifier, judging_images) > nearest + 0.25


def test_reconstruction_works_on_a_folded_model(
    quantized: Quantizer, classifier_of: Classifiers, judging_images: ImageSet
) -> None:
    classifier = classifier_of("inverted_folded")
    nearest = top1(quantized("inverted_folded", "nearest", 2, extra_share=0.0).output, classifier, judging_images)
    rebuilt = quantized("inverted_folded", "brecq", 2, steps=25, extra_share=0.0)
    assert top1(rebuilt.output, classifier, judging_images) > nearest + 0.25


def test_the_account_of_a_block_starts_at_nearest_rounding(quantized: Quantizer) -> None:
    """`before` is what the user would have had: in the first block at W bits, where both get the same input."""
    nearest, rebuilt = quantized("inverted", "nearest", 2), quantized("inverted", "brecq", 2, steps=25)
    assert [name for name, _ in rebuilt.blocks] == [name for name, _ in nearest.blocks]
    assert rebuilt.blocks[1][1].before == pytest.approx(nearest.blocks[1][1].after, rel=0.05)
    assert all(block.after < block.before for _, block in rebuilt.blocks[1:])


def noise(count: int = 6) -> ImageSet:
    return ImageSet(torch.rand(count, *models.IMAGE[1:], generator=torch.Generator().manual_seed(0)))


def shared_bias() -> onnx.ModelProto:
    """One tensor is the bias of a Conv and of an InstanceNormalization: exporters merge equal tensors."""
    nodes = [
        models.node("Conv", "image conv.weight both", "features"),
        models.node("InstanceNormalization", "features scale both", "normed"),
        *models.head("normed"),
    ]
    tensors = {"conv.weight": models.weights(4, 3, 3, 3), "both": models.random(4), "scale": np.ones(4, np.float32)}
    return models.assemble(nodes, {**tensors, **models.head_tensors(4)})


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: models.conv(image=(1, *models.IMAGE[1:])), id="batch 1 in the file"),
        pytest.param(lambda: models.conv(image=(4, *models.IMAGE[1:])), id="batch 4 in the file"),
        pytest.param(shared_bias, id="shared bias"),
        pytest.param(hard_cases.CASES["weight_first"], id="weight as the first operand"),
        pytest.param(hard_cases.CASES["weight_shared"], id="shared weight"),
        pytest.param(hard_cases.CASES["bytes_in"], id="uint8 image"),
        pytest.param(hard_cases.CASES["float16"], id="float16"),
    ],
)
def test_hard_cases_are_quantized(
    write: Callable[[onnx.ModelProto], Path], model: Callable[[], onnx.ModelProto], act_bits: int | None
) -> None:
    """`quantize` holds the written file against the torch model itself; more images than fit the file's batch."""
    classifier = load_classifier(write(model()))
    result = quantize(classifier, noise(), classifier.path.with_name("q.onnx"), recipe("qdrop"), 4, act_bits)
    assert len(result.layers) >= 2
    load_classifier(result.output)


def of_old_operators(opset: int) -> onnx.ModelProto:
    """Operators whose attributes have become operands since: Clip, Pad, Squeeze; BatchNormalization to be folded."""
    nodes = [
        models.node("Pad", "image", "padded", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="constant", value=0.0),
        models.node("Conv", "padded conv.weight", "features"),
        models.batchnorm_node("features", "normed"),
        models.node("Clip", "normed", "active", min=0.0, max=6.0),
        models.node("GlobalAveragePool", "active", "pooled"),
        models.node("Squeeze", "pooled", "flat", axes=[2, 3]),
        models.node("Gemm", "flat head.weight head.bias", "logits", transB=1),
    ]
    tensors = {"conv.weight": models.weights(4, models.CHANNELS, 3, 3)} | models.statistics(4) | models.head_tensors(4)
    return models.assemble(nodes, tensors, opset=opset)


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
@pytest.mark.parametrize(("target", "bits", "act_bits"), [("portable", 4, None), ("ort-cpu", 8, 8)])
def test_files_of_old_opsets_are_raised_and_quantized(
    opset: int, target: str, bits: int, act_bits: int | None, write: Callable[[onnx.ModelProto], Path]
) -> None:
    classifier, images = load_classifier(write(of_old_operators(opset))), noise()
    chosen = choose_target(target, None, act_bits)
    result = quantize(
        classifier, images, classifier.path.with_name("q.onnx"), recipe("nearest"), bits, act_bits, chosen
    )
    written = onnx.load(result.output)
    assert [entry.version for entry in written.opset_import] == [chosen.needs(bits, act_bits)[0]]
    assert not [node for node in written.graph.node if node.op_type == "BatchNormalization"]
    reference = run(classifier.path, classifier, images.pixels)
    assert decibels(reference.astype(np.float64), run(result.output, classifier, images.pixels)) > 20


def test_float_tensors_keep_their_names(write: Callable[[onnx.ModelProto], Path]) -> None:
    """Whether reconstruction changed them or not."""
    classifier = load_classifier(write(models.conv()))
    before = {tensor.name for tensor in onnx.load(classifier.path).graph.initializer}
    for method in ("nearest", "qdrop"):
        path = classifier.path.with_name(f"{method}.onnx")
        quantize(classifier, noise(), path, recipe(method), 4)
        after = {tensor.name for tensor in onnx.load(path).graph.initializer if tensor.data_type == TensorProto.FLOAT}
        assert {name for name in after if not name.endswith(".scale")} == {n for n in before if n.endswith(".bias")}


def test_the_opset_is_the_least_that_the_weights_need(quantized: Quantizer, classifier_of: Classifiers) -> None:
    """4-bit activations are stored in eight bits, so they ask for nothing."""
    for bits, act_bits, least in ((8, 4, 17), (8, None, 17), (4, None, 21)):
        written = onnx.load(quantized("plain", "nearest", bits, act_bits).output)
        assert next(entry.version for entry in written.opset_import if not entry.domain) == least


def test_nothing_to_quantize(write: Callable[[onnx.ModelProto], Path]) -> None:
    nodes = [models.node("GlobalAveragePool", "image", "pooled"), models.node("Flatten", "pooled", "logits")]
    classifier = load_classifier(write(models.assemble(nodes, outputs={"logits": ("batch", 3)})))
    with pytest.raises(MixMixError, match="nothing to quantize"):
        quantize(classifier, noise(), classifier.path.with_name("q.onnx"), recipe("nearest"), 4)


@pytest.mark.parametrize("name", sorted(set(hard_cases.CASES) - {"quantized"}))
def test_every_hard_case_is_written(tmp_path: Path, name: str) -> None:
    """Each layer of the file gets 4-bit integers, and the file computes what the torch model does."""
    classifier = load_classifier(models.write(hard_cases.CASES[name](), tmp_path / "model.onnx"))
    spec = classifier.spec
    pixels = torch.rand(4, spec.channel_count, *spec.size, generator=torch.Generator().manual_seed(0))
    settings = recipe("nearest", extra_share=0.0)
    result = quantize(classifier, ImageSet(pixels), tmp_path / "q.onnx", settings, 4)
    assert result.layers
    kinds = [tensor.data_type for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer]
    assert kinds.count(TensorProto.INT4) >= 2 * len(result.layers)  # integers and zero points


GROUPED = [("residual", 4, "int4"), ("attention", 4, "int4"), ("residual", 2, "int2"), ("inverted", 2, "int4")]


@pytest.mark.parametrize(("model", "bits", "container"), GROUPED)
def test_groups_of_inputs_have_scales_of_their_own(
    model: str,
    bits: int,
    container: str,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    judging_images: ImageSet,
    tmp_path: Path,
) -> None:
    """In the file as in the simulation, where a channel has more inputs than a group; and closer to the float model."""
    classifier, target = classifier_of(model), choose_target("portable", container)
    noise = []
    for size in (0, 16):
        settings = recipe("nearest").model_copy(update={"group_size": size, "extra_share": 0.0})
        output = tmp_path / f"{size}.onnx"
        quantize(classifier, calibration_images, output, settings, bits, None, target)
        logits, expected = (run(path, classifier, judging_images.pixels) for path in (output, classifier.path))
        noise.append(float(np.square(logits - expected).sum()))
    assert noise[1] < noise[0]
    module = to_torch(writeback.prepare_for_quantization(classifier, target, bits), check=False)
    written = Written(tmp_path / "16.onnx")
    for layer in module.layers():
        node = next(n for n in written.dequantized if written.reader[n.output[0]].output[0] == layer.output)
        sizes = [attribute.i for attribute in node.attribute if attribute.name == "block_size"]
        assert sizes == ([16] if layer.shape[1 - layer.axis] > 16 else [])


def test_quantized_inputs_and_eight_bits_leave_one_scale_a_channel(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings = recipe("nearest").model_copy(update={"group_size": 16})
    for bits, act_bits in ((4, 8), (8, None)):
        output = tmp_path / f"{bits}.onnx"
        quantize(classifier_of("inverted"), calibration_images, output, settings, bits, act_bits)
        model = onnx.load(output)
        assert not [node for node in model.graph.node for a in node.attribute if a.name == "block_size"]


WAYS: list[dict[str, object]] = [{"compensate": True}, {"unit": "layer", "steps": 6}, {"unit": "block", "steps": 6}]


@pytest.mark.parametrize("changes", WAYS)
def test_groups_are_reconstructed_and_added_to(
    changes: dict[str, object], classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """By each way of rounding; bits are added where they pay, and a file grows by scales and what may be added."""
    classifier, sizes = classifier_of("residual"), []
    for group_size in (0, 16):
        settings = recipe("nearest").model_copy(update={"group_size": group_size, **changes})
        output = tmp_path / f"{group_size}.onnx"
        result = quantize(classifier, calibration_images, output, settings, 2)
        sizes.append(result.size_after)
        weights = sum(layer.weights for layer in result.layers)
        assert sum((layer.bits - 2) * layer.weights for layer in result.layers) > 0.3 * weights
    assert 0 < sizes[1] - sizes[0] < (36 / 16 + 0.1 * (8 - 2)) * weights / 8

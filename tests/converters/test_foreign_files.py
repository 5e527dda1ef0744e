"""Files as other tools write them: legal, read by onnxruntime, and spelt in ways of their own."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.classifier import Classifier
from converters.conversion import relative_difference, to_torch
from converters.edits import WeightEdit, apply_edits
from converters.errors import ConversionError, ModelError, OutputError, SpecError
from converters.layer_values import read_layers
from converters.load import load_classifier
from converters.outputs import ensure_makeable
from converters.runtime import Session, serialise
from converters.targets import PORTABLE
from converters.writeback import prepare_for_pruning, prepare_for_quantization, prepare_for_training
from tests import models

Load = Callable[[onnx.ModelProto], Classifier]
Write = Callable[[onnx.ModelProto], Path]


def inputs_too(model: onnx.ModelProto) -> onnx.ModelProto:
    """As before IR 4, and with keep_initializers_as_inputs."""
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def test_weights_that_are_inputs_too_do_not_stay_beside_their_integers(load: Load) -> None:
    sizes = []
    for model in (models.batchnorm(), inputs_too(models.batchnorm())):
        prepared = prepare_for_quantization(load(model), PORTABLE, 4)
        layer = to_torch(prepared).layers()[0]
        zeros = np.zeros(layer.shape[0], np.int32)
        ones, container = np.ones(layer.shape[0], np.float32), PORTABLE.weight_container(4)
        edit = WeightEdit(layer.output, np.zeros(layer.shape, np.int32), ones, zeros, 0, 4, container)
        written = apply_edits(prepared.original, [edit])
        assert [value.name for value in written.graph.inputs] == ["image"]
        sizes.append(len(serialise(written)))
    assert sizes[0] == sizes[1]


def enlarging(op: str, opset: int, mode: str) -> onnx.ModelProto:
    nodes = [
        models.node("Conv", "image conv.weight", "features"),
        models.node(op, "features scales", "large", mode=mode),
        models.node("Conv", "large more.weight", "active", strides=[2, 2]),
        *models.head("active"),
    ]
    tensors = {"conv.weight": models.weights(4, 3, 3, 3), "more.weight": models.weights(4, 4, 3, 3, seed=1)}
    scales = {"scales": np.array([1, 1, 1.7, 1.7], np.float32)}
    return models.assemble(nodes, tensors | scales | models.head_tensors(4), opset=opset)


@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_images_are_enlarged_at_a_later_opset_as_they_were(op: str, opset: int, mode: str, load: Load) -> None:
    classifier, x = load(enlarging(op, opset, mode)), models.images()
    for prepared in (prepare_for_quantization(classifier, PORTABLE, 4), prepare_for_pruning(classifier)):
        assert prepared.opset > opset
        expected, actual = (each.session(optimise=False).run(x)[0] for each in (classifier, prepared))
        assert relative_difference(actual, expected) < 1e-5


def test_a_later_opset_that_means_something_else_is_not_written(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def negligent(model: ir.Model, opset: int, **_: object) -> None:
        next(node for node in model.graph if node.op_type == "Relu").op_type = "Tanh"
        model.opset_imports[""] = opset

    classifier = load(models.conv(opset=9))
    monkeypatch.setattr("onnxscript.version_converter.convert_version", negligent)
    with pytest.raises(ConversionError, match=r"at opset \d+ it answers otherwise than at its own, 9 \(by"):
        prepare_for_quantization(classifier, PORTABLE, 4)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_half_a_pixel_is_enough_to_be_refused(mode: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the repair of Resize above: after a global mean little is left of the difference."""
    monkeypatch.setattr("converters.passes.RESIZE_MODES", 0)
    with pytest.raises(ConversionError, match="it answers otherwise than at its own, 9"):
        prepare_for_quantization(load(enlarging("Upsample", 9, mode)), PORTABLE, 4)


def test_a_file_that_overflows_is_not_the_converters_fault(load: Load) -> None:
    model = models.conv()
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "conv.weight")
    first.CopyFrom(numpy_helper.from_array(np.full((4, 3, 3, 3), 3e37, np.float32), "conv.weight"))
    classifier = load(model)
    prepare_for_quantization(classifier, PORTABLE, 4)
    with pytest.raises(ModelError, match="onnxruntime itself gets NaN or infinity"):
        to_torch(classifier)


def training_batchnorm(opset: int = 15, *, handed_out: bool = False) -> onnx.ModelProto:
    model = models.batchnorm(opset=opset)
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    norm.attribute.append(helper.make_attribute("training_mode", 1))
    norm.output.extend(["running.mean", "running.var"])
    if handed_out:
        model.graph.output.append(helper.make_tensor_value_info("running.mean", TensorProto.FLOAT, [4]))
    return model


def test_batchnorm_in_training_mode_takes_its_stored_statistics(load: Load) -> None:
    x = models.images()
    found = load(training_batchnorm())
    of_the_batch = Session(found.path).run(x)[0]
    plain = load(models.batchnorm(opset=15))
    assert len(found.notes) == 1
    assert "1 BatchNormalization" in found.notes[0]
    assert not plain.notes
    expected = plain.session().run(x)[0]
    for session in (found.session(), prepare_for_training(found).session()):
        np.testing.assert_array_equal(session.run(x)[0], expected)
    assert np.abs(of_the_batch - expected).max() > 1e-2
    np.testing.assert_allclose(to_torch(found)(torch.from_numpy(x)).numpy(), expected, atol=1e-5)


def test_statistics_of_the_batch_as_an_output_are_refused(load: Load) -> None:
    with pytest.raises(ModelError, match="node normed/BatchNormalization hands out the statistics of its batch"):
        load(training_batchnorm(handed_out=True))


def test_a_dropout_in_training_is_refused_within_a_function_too(load: Load) -> None:
    nodes = [
        models.node("Constant", "", "ratio", value_float=0.5),
        models.node("Constant", "", "training", value=numpy_helper.from_array(np.array(True))),
        models.node("Dropout", "x ratio training", "y"),
    ]
    opsets = [helper.make_opsetid("", 17)]
    model = models.assemble(
        [models.node("Drop", "image", "dropped", domain="local"), *models.head("dropped")], models.head_tensors(3)
    )
    model.functions.append(helper.make_function("local", "Drop", ["x"], ["y"], nodes, opsets))
    with pytest.raises(ModelError, match="drops at random, as in training"):
        load(model)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_one_tensor_in_another_float_type_says_nothing_of_the_logits(kind: int, load: Load) -> None:
    nodes = [
        models.node("Cast", "factor", "wide", to=TensorProto.FLOAT),
        models.node("Mul", "image wide", "brighter"),
        models.node("Flatten", "brighter", "flat"),
        models.node("Gemm", "flat fc.weight", "scores", transB=1),
        models.node("Softmax", "scores", "probabilities", axis=-1),
    ]
    tensors = {"fc.weight": models.weights(models.CLASSES, models.PIXELS)}
    model = models.assemble(nodes, tensors, outputs={"probabilities": models.LOGITS})
    model.graph.initializer.append(helper.make_tensor("factor", kind, [], [2.0]))
    classifier, x = load(model), models.images()
    logits = classifier.session().run(x)[0]
    np.testing.assert_allclose(to_torch(classifier)(torch.from_numpy(x)).numpy(), logits, atol=1e-5)


def test_a_batch_of_minus_one_is_open(load: Load) -> None:
    model = models.conv()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = -1
    classifier = load(model)
    assert classifier.fixed_batch is None
    assert to_torch(classifier)(torch.from_numpy(models.images(3))).shape == (3, models.CLASSES)


def clipped(*, quantized: bool) -> onnx.ModelProto:
    """A Clip whose bounds have shape [1], then perhaps a QuantizeLinear that it leaves 4 bits of."""
    nodes = [models.node("Clip", "image low high", "clipped")]
    if quantized:
        nodes += [
            models.node("QuantizeLinear", "clipped scale zero", "integers"),
            models.node("DequantizeLinear", "integers scale zero", "read"),
        ]
    nodes.append(models.node("Conv", f"{'read' if quantized else 'clipped'} conv.weight", "features"))
    bounds = {"low": np.zeros(1, np.float32), "high": np.full(1, 1.5, np.float32)}
    quantizer = {"scale": np.float32(0.1), "zero": np.uint8(0)} if quantized else {}
    tensors = {"conv.weight": models.weights(4, 3, 3, 3), **bounds, **quantizer, **models.head_tensors(4)}
    return models.assemble([*nodes, *models.head("features")], tensors)


def test_bounds_of_shape_one(load: Load) -> None:
    classifier, x = load(clipped(quantized=False)), models.images()
    np.testing.assert_allclose(
        to_torch(classifier)(torch.from_numpy(x)).numpy(), classifier.session().run(x)[0], atol=1e-5
    )
    quantized = load(clipped(quantized=True))
    assert read_layers(quantized, classifier)[0].act_bits == 4


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_batchnorm_is_folded_into_a_weight_behind_a_cast(kind: int, load: Load) -> None:
    model = models.batchnorm()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv.weight")
    values = numpy_helper.to_array(weight).ravel()
    model.graph.initializer.remove(weight)
    model.graph.initializer.append(helper.make_tensor("half", kind, [4, 3, 3, 3], values))
    model.graph.node.insert(0, models.node("Cast", "half", "conv.weight", to=TensorProto.FLOAT))
    prepared = prepare_for_quantization(load(model), PORTABLE, 4)
    assert [node.op_type for node in prepared.original.graph][:2] == ["Conv", "Relu"]


def beside(folder: Path, seed: int, *, one_file: bool = True) -> Path:
    """A Gemm whose weight, and sixty tensors that are added to it, lie in files beside the model."""
    folder.mkdir()
    tensors = {"fc.weight": models.weights(models.CLASSES, models.PIXELS, seed=seed)}
    nodes, weight = [], "fc.weight"
    for index in range(60):
        tensors[f"more{index}"] = models.weights(models.CLASSES, models.PIXELS, seed=index)
        nodes.append(models.node("Add", f"{weight} more{index}", f"sum{index}"))
        weight = f"sum{index}"
    nodes += [models.node("Flatten", "image", "flat"), models.node("Gemm", f"flat {weight}", "logits", transB=1)]
    path = folder / "model.onnx"
    location = "model.data" if one_file else None
    onnx.save(
        models.assemble(nodes, tensors),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location=location,
        size_threshold=0,
    )
    return path


def test_other_weights_beside_the_file_are_another_model(tmp_path: Path) -> None:
    found = [load_classifier(beside(tmp_path / str(seed), seed)).sha256 for seed in (100, 100 + 1)]
    again = load_classifier(tmp_path / "100" / "model.onnx").sha256
    assert found[0] == again != found[1]
    both = [path.read_bytes() for path in (tmp_path / "100" / "model.onnx", tmp_path / "100" / "model.data")]
    assert again == hashlib.sha256(both[0] + hashlib.sha256(both[1]).digest()).hexdigest()


@pytest.fixture
def few_files() -> Iterator[None]:
    """Of files that the process may hold, 40 more than it does."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux does")
@pytest.mark.usefixtures("few_files")
def test_a_file_for_each_tensor_is_not_held_open(tmp_path: Path) -> None:
    classifier = load_classifier(beside(tmp_path / "many", 0, one_file=False))
    x = models.images()
    expected = classifier.session().run(x)[0]
    np.testing.assert_allclose(to_torch(classifier)(torch.from_numpy(x)).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
def test_sparse_weights_are_named(load: Load, where: str) -> None:
    model = models.assemble(models.linear(), {})
    values = helper.make_tensor("fc.weight", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [3])
    shape = [models.CLASSES, models.PIXELS]
    sparse = helper.make_sparse_tensor(values, indices, shape)
    if where == "initializer":
        model.graph.sparse_initializer.append(sparse)
    else:
        constant = helper.make_node("Constant", [], ["fc.weight"], sparse_value=sparse)
        if where == "function":
            opsets = [helper.make_opsetid("", 17)]
            model.functions.append(helper.make_function("own", "Weight", [], ["fc.weight"], [constant], opsets))
            constant = helper.make_node("Weight", [], ["fc.weight"], domain="own")
            model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node.insert(0, constant)
    with pytest.raises(ModelError, match="sparse tensors, which are not supported: store its weights dense"):
        load(model)


def test_a_sidecar_and_a_folder_that_cannot_be_read(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(models.conv())
    path.with_suffix(".toml").write_text("[input]\nmean = 0.5\n")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SpecError, match=r"\.toml cannot be read \(Permission denied\)"):
        load_classifier(path)
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(OutputError, match="cannot be written to"):
        ensure_makeable(tmp_path / "out")

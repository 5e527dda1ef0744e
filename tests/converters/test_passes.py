"""Each pass says truly whether it changed the graph, and changes nothing that onnxruntime computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from converters import batch, graphs, passes
from converters.classifier import Classifier
from converters.errors import ModelError
from converters.targets import PORTABLE, TARGETS, choose_target
from converters.writeback import prepare_for_pruning, prepare_for_quantization
from tests import hard_cases, models
from tests.converters import oracle

ROUNDING = 1e-5  # of the largest magnitude: a folded weight is rounded to float32 once more


Load = Callable[[onnx.ModelProto], Classifier]


def noise(classifier: Classifier) -> models.Floats:
    return models.random(2, classifier.spec.channel_count, *classifier.spec.size, seed=3)


def names(model: ir.Model) -> set[str]:
    return {str(value.name) for node in model.graph for value in node.outputs}


def test_normalise_keeps_outputs_and_names(embedded: Classifier) -> None:
    """To the bit; and every initializer and value that is left has the name that it has in the file."""
    x = noise(embedded)
    np.testing.assert_array_equal(oracle.run(embedded.normal, x), oracle.run(embedded.original, x))
    assert names(embedded.normal) <= names(embedded.original)
    hidden = ("Constant", "Identity", "Transpose")  # the last is how a Linear on tokens comes to its MatMul
    constants = {str(v.name) for n in embedded.original.graph for v in n.outputs if n.op_type in hidden}
    read = {str(n.inputs[1].name) for n in embedded.normal.graph if n.op_type in passes.LAYERS and n.inputs[1]}
    weights = read & set(embedded.normal.graph.initializers)
    assert weights
    assert weights <= set(embedded.original.graph.initializers) | constants


def test_normalise_has_nothing_left_to_do(embedded: Classifier) -> None:
    assert passes.normalise(embedded.normal.clone()) == []


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.conv(), []),
        (models.fixed_batch(), ["open batch"]),
        (models.hidden_weight("Constant"), ["constants are initializers"]),
        (models.shared_weight(), ["one initializer a layer"]),
    ],
)
def test_passes_say_what_they_changed(model: onnx.ModelProto, expected: list[str]) -> None:
    graph = ir.from_proto(model)
    assert passes.normalise(graph) == expected
    x = models.images(1)
    np.testing.assert_array_equal(oracle.run(graph, x), oracle.run(model, x))


def test_fixed_batch_is_opened() -> None:
    model, x = ir.from_proto(models.fixed_batch()), models.images(3)
    assert batch.open_batch(model) is True
    expected = np.concatenate([oracle.run(models.fixed_batch(), row[None]) for row in x])
    oracle.assert_close(oracle.run(model, x), expected, 1e-6)
    assert [str(value.shape[0]) for value in (*model.graph.inputs, *model.graph.outputs) if value.shape] == [
        "batch"
    ] * 2
    assert batch.open_batch(model) is False


def test_initializers_that_are_inputs_too() -> None:
    """IR version 3 lists every weight among the inputs."""
    proto, x = models.conv(), models.images()
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer
    )
    model = ir.from_proto(proto)
    assert "initializers are not inputs" in passes.normalise(model)
    assert [value.name for value in model.graph.inputs] == ["image"]
    np.testing.assert_array_equal(oracle.run(model, x), oracle.run(proto, x))


def batch_size_reshape(rows: int, target: list[int]) -> onnx.ModelProto:
    """The image in rows of `rows` pixels, then a Reshape to [batch size, *target], the size read off the image."""
    nodes = [
        models.node("Reshape", "image rows", "table"),
        models.node("Shape", "image", "shape"),
        models.node("Gather", "shape zero", "batch_size", axis=0),
        models.node("Unsqueeze", "batch_size axes", "size"),
        models.node("Concat", "size rest", "target", axis=0),
        models.node("Reshape", "table target", "square"),
        models.node("Flatten", "square", "flat"),
        models.node("Gemm", "flat fc.weight", "logits", transB=1),
    ]
    numbers = {"rows": [-1, rows], "zero": 0, "axes": [0], "rest": target}
    tensors = {name: np.array(value, np.int64) for name, value in numbers.items()}
    return models.assemble(nodes, {**tensors, "fc.weight": models.weights(5, models.PIXELS)})


@pytest.mark.parametrize("rows", [models.PIXELS, models.SIDE], ids=["a row an image", "many rows an image"])
@pytest.mark.parametrize("target", [[models.PIXELS], [-1], [24, 8]], ids=str)
def test_batch_size_in_a_reshape(rows: int, target: list[int]) -> None:
    """Whatever the first dimension of the value that is reshaped: windowed attention folds windows into it."""
    proto, x = batch_size_reshape(rows, target), models.images(3)
    model = ir.from_proto(proto)
    passes.normalise(model)
    np.testing.assert_array_equal(oracle.run(model, x), oracle.run(proto, x))


def test_batch_size_is_kept_out_of_the_data_flow() -> None:
    """Where the value that is reshaped is known to begin with the batch."""
    proto = batch_size_reshape(models.PIXELS, [24, 8])
    proto.graph.node[0].CopyFrom(models.node("Flatten", "image", "table"))
    model = ir.from_proto(proto)
    assert "free reshapes" in passes.normalise(model)
    assert [node.op_type for node in model.graph] == ["Flatten", "Reshape", "Flatten", "Gemm"]
    np.testing.assert_array_equal(oracle.run(model, models.images()), oracle.run(proto, models.images()))


def test_tidy(embedded: Classifier) -> None:
    """What it drops nobody computes with; what has a name outside keeps it."""
    model = embedded.original.clone()
    model.graph.node(0).doc_string = "File somewhere.py, line 1"
    assert passes.tidy(model) is True
    before, after = embedded.original, model
    x = noise(embedded)
    np.testing.assert_array_equal(oracle.run(after, x), oracle.run(before, x))
    assert after.metadata_props == before.metadata_props
    proto = [ir.to_proto(each).graph for each in (before, after)]
    assert proto[0].input == proto[1].input
    assert proto[0].output == proto[1].output
    assert not {info.name for info in proto[1].value_info} & names(after)
    assert not any(node.doc_string for node in proto[1].node)
    assert passes.tidy(model) is False


def test_unshare_weights() -> None:
    proto, x = models.shared_weight(), models.images()
    model = ir.from_proto(proto)
    assert passes.unshare_weights(model) is True
    first, second = (n.inputs[1] for n in model.graph if n.outputs[0].name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert {first.name, second.name} == {"square", "square.1"}
    np.testing.assert_array_equal(graphs.to_numpy(first), graphs.to_numpy(second))
    np.testing.assert_array_equal(oracle.run(model, x), oracle.run(proto, x))
    assert passes.unshare_weights(model) is False


def test_raise_opset_of_embedded_models(embedded: Classifier) -> None:
    model = embedded.original.clone()
    assert passes.raise_opset(model, 21, "model.onnx") is True
    model.ir_version = 10
    assert model.opset_imports[""] == 21
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = noise(embedded)
    oracle.assert_close(oracle.run(model, x), oracle.run(embedded.original, x), 1e-6)
    assert model.metadata_props == embedded.original.metadata_props
    assert set(embedded.original.graph.initializers) <= set(model.graph.initializers)
    assert passes.raise_opset(model, 21, "model.onnx") is False


@pytest.mark.parametrize("opset", [11, 13])
def test_raise_opset_from_far_below(opset: int) -> None:
    proto, x = models.conv(opset=opset, pads=[1, 1, 1, 1]), models.images()
    model = ir.from_proto(proto)
    passes.raise_opset(model, 21, "model.onnx")
    model.ir_version = 10
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), 1e-6)


def test_raise_opset_that_cannot() -> None:
    with pytest.raises(ModelError, match=r"model\.onnx: cannot be raised to opset 99.*: export it at that opset"):
        passes.raise_opset(ir.from_proto(models.conv()), 99, "model.onnx")


@pytest.mark.parametrize(
    ("container", "bits", "act_bits", "opset", "ir_version"),
    [
        ("int4", 4, None, 21, 10),
        ("int4", 8, 8, 17, 8),
        ("int4", 8, 16, 21, 10),
        ("int2", 2, None, 25, 13),
        ("int2", 3, None, 21, 10),
        ("int8", 2, 8, 17, 8),
    ],
)
def test_prepare_for_quantization(
    embedded: Classifier, container: str, bits: int, act_bits: int | None, opset: int, ir_version: int
) -> None:
    """BatchNorm is folded, opset and IR are as high as they need to be, and the rest is as it was."""
    ready = prepare_for_quantization(embedded, choose_target("portable", container), bits, act_bits)
    assert ready.original.opset_imports[""] == max(opset, embedded.opset)
    assert ready.original.ir_version == max(ir_version, {17: 8, 20: 9}[embedded.opset])
    assert (ready.spec, ready.sha256, ready.path) == (embedded.spec, embedded.sha256, embedded.path)
    assert ready.original.metadata_props == embedded.original.metadata_props
    x = noise(embedded)
    oracle.assert_close(oracle.run(ready.original, x), oracle.run(embedded.original, x), ROUNDING)
    oracle.assert_close(oracle.run(ready.normal, x), oracle.run(embedded.original, x), ROUNDING)


@pytest.mark.parametrize("opset", [17, 21])
def test_what_is_said_of_inputs_and_outputs_survives(load: Load, opset: int) -> None:
    """At an opset that the types need already, and raised to it."""
    proto = models.conv(opset=opset)
    proto.graph.metadata_props.add(key="of the graph", value="1")
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.metadata_props.add(key=f"of {value.name}", value="2")
        value.doc_string = f"this is {value.name}"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    after = ir.to_proto(prepare_for_quantization(load(proto), PORTABLE, 4).original)
    assert after.opset_import[0].version == 21
    assert after.graph.metadata_props == proto.graph.metadata_props
    assert (after.graph.input, after.graph.output) == (proto.graph.input, proto.graph.output)


def test_unused_name() -> None:
    graph = ir.from_proto(models.conv()).graph
    assert graphs.unused_name(graph, "new") == "new"
    for taken in ("image", "conv.weight", "features"):
        assert graphs.unused_name(graph, taken) == f"{taken}.1"


def test_a_name_in_a_branch_is_taken() -> None:
    """A branch may not hide a value of the graph around it."""
    graph = ir.from_proto(hard_cases.constant_if()).graph
    for taken in ("a", "b", "features"):
        assert graphs.unused_name(graph, taken) == f"{taken}.1"


def test_constant_behind() -> None:
    hidden = ir.from_proto(models.hidden_weight()).graph
    conv = hidden.node("features/Conv")
    found = graphs.constant_behind(conv.inputs[1])
    assert found is not None
    assert found.name == "conv.weight"
    assert graphs.constant_behind(conv.inputs[0]) is None
    assert graphs.constant_behind(conv.outputs[0]) is None
    with pytest.raises(ValueError, match="features is not constant"):
        graphs.to_numpy(conv.outputs[0])


def test_the_ir_version_of_a_new_exporter_is_not_kept(load: Load) -> None:
    """Which older runtimes refuse, though nothing in the file needs it; unknown domains change nothing."""
    proto = models.conv(opset=17)
    proto.ir_version = 13
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert prepare_for_quantization(load(proto), PORTABLE, 4).original.ir_version == 10
    assert prepare_for_quantization(load(proto), TARGETS["ort-cpu"], 8, 8).original.ir_version == 8
    assert prepare_for_pruning(load(proto)).original.ir_version == 8


def linear(*, rank: int = 2, bias: tuple[int, ...] = (models.CLASSES,), first: bool = True) -> onnx.ModelProto:
    """A MatMul of rows, or of more axes, and the Add of a bias."""
    nodes = [
        models.node("Flatten", "image", "rows"),
        models.node("Reshape", "rows shape", "data"),
        models.node("MatMul", "data w", "product"),
        models.node("Add", "product bias" if first else "bias product", "sum"),
        models.node("Flatten", "sum", "logits"),
    ]
    shape = np.array([-1, *[1] * (rank - 2), models.PIXELS], np.int64)
    tensors = {"shape": shape, "w": models.weights(models.PIXELS, models.CLASSES), "bias": models.weights(*bias)}
    return models.assemble(nodes, tensors)


@pytest.mark.parametrize("first", [True, False])
def test_a_bias_joins_the_rows_that_it_is_added_to(first: bool, load: Load) -> None:
    classifier, x = load(linear(first=first)), models.images()
    prepared = prepare_for_quantization(classifier, PORTABLE, 4)
    found = [node for node in prepared.original.graph if node.op_type in ("MatMul", "Gemm", "Add")]
    assert [node.op_type for node in found] == ["Gemm"]
    assert found[0].outputs[0].name == "sum"
    oracle.assert_close(oracle.run(prepared.original, x), oracle.run(classifier.original, x), ROUNDING)


@pytest.mark.parametrize("how", [{"rank": 3}, {"bias": (1,)}, {"bias": (1, models.CLASSES)}])
def test_other_sums_stay(how: dict[str, Any], load: Load) -> None:
    prepared = prepare_for_quantization(load(linear(**how)), PORTABLE, 4)
    assert "Gemm" not in {node.op_type for node in prepared.original.graph}


def test_what_a_file_says_wrongly_of_ranks_joins_nothing(load: Load) -> None:
    """Three axes by what onnxruntime computes, two by what the file says."""
    proto, x = linear(rank=3), models.images()
    said = onnx.helper.make_tensor_value_info("data", onnx.TensorProto.FLOAT, ["batch", models.PIXELS])
    proto.graph.value_info.append(said)
    classifier = load(proto)
    prepared = prepare_for_quantization(classifier, PORTABLE, 4)
    assert "Gemm" not in {node.op_type for node in prepared.original.graph}
    oracle.assert_close(oracle.run(prepared.original, x), oracle.run(classifier.original, x), ROUNDING)


def test_a_stack_of_matrices_joins_nothing(load: Load) -> None:
    proto = linear()
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    weight.dims[:] = [1, models.PIXELS, models.CLASSES]
    prepared = prepare_for_quantization(load(proto), PORTABLE, 4)
    assert "Gemm" not in {node.op_type for node in prepared.original.graph}


def test_a_product_that_others_read_stays(load: Load) -> None:
    proto = linear()
    proto.graph.node.insert(4, models.node("Mul", "sum product", "more"))
    proto.graph.node[5].input[0] = "more"
    prepared = prepare_for_quantization(load(proto), PORTABLE, 4)
    assert "Gemm" not in {node.op_type for node in prepared.original.graph}

"""BatchNormalization goes into the Conv before it where that is right, and stays where it is not."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from converters import passes
from converters.classifier import Classifier
from tests import models
from tests.converters import oracle

ROUNDING = 1e-5  # of the largest magnitude: a folded weight is rounded to float32 once more


def names(model: ir.Model) -> set[str]:
    return {str(value.name) for node in model.graph for value in node.outputs}


def count(model: ir.Model) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph)


def folded(proto: onnx.ModelProto) -> ir.Model:
    """The model with `fold_batchnorm` applied, which must say that it changed something."""
    model = ir.from_proto(proto)
    assert passes.fold_batchnorm(model) is True
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def left_alone(proto: onnx.ModelProto) -> None:
    """`fold_batchnorm` says that it changed nothing, and did not."""
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString()
    assert passes.fold_batchnorm(model) is False
    assert ir.to_proto(model).SerializeToString() == before


def test_fold_batchnorm_of_embedded_models(embedded: Classifier) -> None:
    """Folded where a Conv's output goes nowhere else; all later values keep name and content."""
    model = embedded.original.clone()
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    alone = [n for n in norms if _writer(n.inputs[0]) == "Conv" and len(list(n.inputs[0].uses())) == 1]  # type: ignore[union-attr]
    lost = {str(node.inputs[0].name) for node in alone}  # type: ignore[union-attr]
    assert passes.fold_batchnorm(model) is bool(alone)
    assert count(model) == len(norms) - len(alone)
    missing = names(embedded.original) - names(model)
    hidden = {str(node.outputs[0].name) for node in embedded.original.graph if node.op_type == "Identity"}
    assert lost <= missing <= lost | hidden
    x, kept = (
        models.random(2, embedded.spec.channel_count, *embedded.spec.size, seed=3),
        [str(node.outputs[0].name) for node in alone],
    )
    oracle.assert_close(oracle.run(model, x), oracle.run(embedded.original, x), ROUNDING)
    before, after = (oracle.values(each, x, kept[:6]) for each in (embedded.original, model))
    for name in kept[:6]:
        oracle.assert_close(after[name], before[name], ROUNDING)
    assert passes.fold_batchnorm(model) is False


def _writer(value: ir.Value | None) -> str | None:
    producer = value.producer() if value is not None else None
    return producer.op_type if producer is not None else None


def test_fold_batchnorm_leaves_a_shared_value_alone() -> None:
    left_alone(models.batchnorm(shared=True))


def test_fold_batchnorm_leaves_an_output_alone() -> None:
    model = models.batchnorm()
    model.graph.output.append(onnx.helper.make_tensor_value_info("features", 1, ("batch", 4, 8, 8)))
    left_alone(model)


def test_fold_batchnorm_leaves_training_alone() -> None:
    model = models.batchnorm()
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    left_alone(model)


def test_fold_batchnorm_leaves_other_neighbours_alone() -> None:
    nodes = [models.node("Relu", "image", "active"), models.batchnorm_node("active", "normed"), *models.head("normed")]
    left_alone(models.assemble(nodes, {**models.statistics(3), **models.head_tensors(3)}))


def test_fold_batchnorm_removes_what_it_used() -> None:
    proto, x = models.batchnorm(), models.images()
    model = folded(proto)
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)
    assert len(model.graph.initializers) == 4
    assert {"normed", "active", "logits"} <= names(model)


def test_fold_batchnorm_at_the_output() -> None:
    """A Conv with a bias, and the output's name and shape."""
    proto, x = models.batchnorm_last(), models.images()
    model = folded(proto)
    assert ir.to_proto(model).graph.output == proto.graph.output
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)


@pytest.mark.parametrize("op", ["Identity", "Constant"])
def test_fold_batchnorm_into_a_hidden_weight(op: str) -> None:
    proto, x = models.hidden_weight(op), models.images()
    proto.graph.node[1].output[0] = "raw"
    proto.graph.node.insert(2, models.batchnorm_node("raw", "features"))
    for name, array in models.statistics(4).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = folded(proto)
    assert count(model) == 0
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)


def test_fold_batchnorm_copies_what_is_shared() -> None:
    """Two Convs read one weight, each with a BatchNormalization of its own that reads shared statistics."""
    nodes = [
        models.node("Conv", "image conv.weight", "left"),
        models.node("Conv", "image conv.weight", "right", dilations=[2, 2], pads=[1, 1, 1, 1]),
        models.batchnorm_node("left", "left_normed"),
        models.node("BatchNormalization", "right bn.var bn.bias bn.mean bn.var", "right_normed"),
        models.node("Add", "left_normed right_normed", "sum"),
        *models.head("sum"),
    ]
    tensors = {"conv.weight": models.weights(4, 3, 3, 3), **models.statistics(4), **models.head_tensors(4)}
    proto, x = models.assemble(nodes, tensors), models.images()
    oracle.assert_close(oracle.run(folded(proto), x), oracle.run(proto, x), ROUNDING)

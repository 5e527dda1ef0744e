"""BatchNormalization, however it is spelt, goes into the Conv before it where that is right, and else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from converters import folding
from converters.classifier import Classifier
from tests import models
from tests.converters import oracle

ROUNDING = 1e-5  # of the largest magnitude: a folded weight is rounded to float32 once more


def names(model: ir.Model) -> set[str]:
    return {str(value.name) for node in model.graph for value in node.outputs}


def count(model: ir.Model) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph)


def folded(proto: onnx.ModelProto) -> ir.Model:
    """The model with `fold_affine` applied, which must say that it changed something."""
    model = ir.from_proto(proto)
    assert folding.fold_affine(model) is True
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def left_alone(proto: onnx.ModelProto) -> None:
    """`fold_affine` says that it changed nothing, and did not."""
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString()
    assert folding.fold_affine(model) is False
    assert ir.to_proto(model).SerializeToString() == before


def test_folding_of_embedded_models(embedded: Classifier) -> None:
    """Folded where a Conv's output goes nowhere else; all later values keep name and content."""
    model = embedded.original.clone()
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    read = [(norm, source) for norm in norms if (source := norm.inputs[0]) is not None]
    alone = {norm: source for norm, source in read if _writer(source) == "Conv" and len(source.uses()) == 1}
    lost = {str(source.name) for source in alone.values()}
    assert folding.fold_affine(model) is bool(alone)
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
    assert folding.fold_affine(model) is False


def _writer(value: ir.Value | None) -> str | None:
    producer = value.producer() if value is not None else None
    return producer.op_type if producer is not None else None


def test_folding_leaves_a_shared_value_alone() -> None:
    left_alone(models.batchnorm(shared=True))


def test_folding_leaves_an_output_alone() -> None:
    model = models.batchnorm()
    model.graph.output.append(onnx.helper.make_tensor_value_info("features", 1, ("batch", 4, 8, 8)))
    left_alone(model)


def test_folding_leaves_training_alone() -> None:
    model = models.batchnorm()
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    left_alone(model)


def test_folding_leaves_other_neighbours_alone() -> None:
    nodes = [models.node("Relu", "image", "active"), models.batchnorm_node("active", "normed"), *models.head("normed")]
    left_alone(models.assemble(nodes, {**models.statistics(3), **models.head_tensors(3)}))


def test_folding_removes_what_it_used() -> None:
    proto, x = models.batchnorm(), models.images()
    model = folded(proto)
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)
    assert len(model.graph.initializers) == 4
    assert {"normed", "active", "logits"} <= names(model)


def test_folding_at_the_output() -> None:
    """A Conv with a bias, and the output's name and shape."""
    proto, x = models.batchnorm_last(), models.images()
    model = folded(proto)
    assert ir.to_proto(model).graph.output == proto.graph.output
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)


@pytest.mark.parametrize("op", ["Identity", "Constant"])
def test_folding_into_a_hidden_weight(op: str) -> None:
    proto, x = models.hidden_weight(op), models.images()
    proto.graph.node[1].output[0] = "raw"
    proto.graph.node.insert(2, models.batchnorm_node("raw", "features"))
    for name, array in models.statistics(4).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = folded(proto)
    assert count(model) == 0
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)


def test_folding_copies_what_is_shared() -> None:
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


CHANNELS = 4
OFFSETS = models.random(CHANNELS, seed=5)
SHAPES = {1: [(4, 1, 1), (1, 4, 1, 1), (1, 1, 1), ()], 3: [(4,), (1, 1, 4), (1,), ()]}
"""Of constants that do the same to all of a channel, by the axis of channels."""


@st.composite
def affine_chains(draw: st.DrawFn) -> tuple[onnx.ModelProto, int]:
    """A Conv, then Transposes and arithmetic by channel in any order; and how much of that arithmetic there is."""
    biased, axis, value, tensors = draw(st.booleans()), 1, "raw", {"w": models.weights(CHANNELS, 3, 3, 3)}
    tensors |= {"b": OFFSETS} if biased else {}
    nodes = [models.node("Conv", "image w b" if biased else "image w", value, pads=[1, 1, 1, 1])]
    kinds = draw(st.lists(st.sampled_from(["Mul", "Add", "Sub", "Div", "Transpose", "Norm"]), max_size=5))
    for index, kind in enumerate(kinds):
        result = f"value{index}"
        if kind == "Transpose":
            perm, axis = ([0, 2, 3, 1], 3) if axis == 1 else ([0, 3, 1, 2], 1)
            nodes.append(models.node(kind, value, result, perm=perm))
        elif kind == "Norm":
            if axis != 1:
                continue
            nodes.append(models.batchnorm_node(value, result))
            tensors |= models.statistics(CHANNELS)
        else:
            shape = draw(st.sampled_from(SHAPES[axis]))
            wide = OFFSETS if CHANNELS in shape else OFFSETS[:1]
            tensors[f"c{index}"] = (wide + np.float32(index + 2)).reshape(shape)
            operands = [value, f"c{index}"]
            if kind != "Div" and draw(st.booleans()):
                operands.reverse()
            nodes.append(models.node(kind, " ".join(operands), result))
        value = result
    if axis != 1:
        nodes.append(models.node("Transpose", value, "back", perm=[0, 3, 1, 2]))
        value = "back"
    foldable = sum(node.op_type in ("Mul", "Add", "Sub", "Div", "BatchNormalization") for node in nodes)
    return models.assemble([*nodes, *models.head(value)], {**tensors, **models.head_tensors(CHANNELS)}), foldable


@settings(deadline=None, max_examples=40)
@given(chain=affine_chains())
def test_folding_of_any_chain(chain: tuple[onnx.ModelProto, int]) -> None:
    """Whatever the spelling, the Conv is left, and what has a name of before has the numbers of before."""
    proto, foldable = chain
    x, model = models.images(), ir.from_proto(proto)
    before = {node.op_type for node in model.graph if node.op_type not in ("Mul", "Add", "Sub", "Div")}
    end = proto.graph.node[-len(models.head("x")) - 1].output[0]
    assert folding.fold_affine(model) is (foldable > 0)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {node.op_type for node in model.graph} == before - {"BatchNormalization"}
    assert end in names(model)
    kept = sorted(names(model) & names(ir.from_proto(proto)))
    actual, expected = oracle.values(model, x, kept), oracle.values(proto, x, kept)
    for name in kept:
        oracle.assert_close(actual[name], expected[name], ROUNDING)
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)


@pytest.mark.parametrize(
    ("op", "operands", "constant"),
    [
        ("Mul", "raw c", np.ones((1, 4, 6, 6), np.float32)),
        ("Add", "raw c", np.ones((4, 6, 1), np.float32)),
        ("Add", "raw c", np.ones((6,), np.float32)),
        ("Mul", "raw c", np.ones((2, 1, 1, 1), np.float32)),
        ("Mul", "raw c", np.ones((1, 1, 1, 1, 1), np.float32)),
        ("Div", "raw c", np.zeros((4, 1, 1), np.float32)),
        ("Div", "c raw", np.ones((4, 1, 1), np.float32)),
        ("Mul", "raw raw", np.ones((), np.float32)),
        ("Pow", "raw c", np.ones((), np.float32)),
    ],
)
def test_folding_leaves_other_arithmetic_alone(op: str, operands: str, constant: oracle.Array) -> None:
    nodes = [models.node("Conv", "image w", "raw"), models.node(op, operands, "value")]
    left_alone(models.assemble(nodes, {"w": models.weights(4, 3, 3, 3), "c": constant}, outputs={"value": ()}))


def test_folding_of_a_scale_alone_gives_no_bias() -> None:
    nodes = [models.node("Conv", "image w", "raw"), models.node("Mul", "raw c", "scaled"), *models.head("scaled")]
    tensors = {"w": models.weights(4, 3, 3, 3), "c": OFFSETS.reshape(4, 1, 1), **models.head_tensors(4)}
    model = folded(models.assemble(nodes, tensors))
    assert len(next(iter(model.graph)).inputs) == 2


def padded(around: list[int], *operands: oracle.Array, mode: str = "constant", **conv: Any) -> onnx.ModelProto:
    """Pad and Conv, with what Pad takes behind its pads."""
    names = ["fill", "axes"][: len(operands)]
    given = " ".join(["image", "pads", *names])
    nodes = [
        models.node("Pad", given, "wide", mode=mode),
        models.node("Conv", "wide w", "value", **conv),
        *models.head("value"),
    ]
    tensors = {"pads": np.array(around, np.int64), "w": models.weights(4, 3, 3, 3), **models.head_tensors(4)}
    return models.assemble(nodes, {**tensors, **dict(zip(names, operands, strict=True))}, opset=18)


@pytest.mark.parametrize("conv", [{}, {"pads": [1, 0, 2, 1], "strides": [2, 2]}, {"auto_pad": "VALID"}])
@pytest.mark.parametrize("fill", [(), (np.float32(0),)])
def test_a_conv_pads_itself(fill: tuple[oracle.Array, ...], conv: dict[str, Any]) -> None:
    proto, x = padded([0, 0, 0, 1, 0, 0, 2, 3], *fill, **conv), models.images()
    model = ir.from_proto(proto)
    assert folding.fold_padding(model) is True
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert "Pad" not in {node.op_type for node in model.graph}
    oracle.assert_close(oracle.run(model, x), oracle.run(proto, x), ROUNDING)
    assert folding.fold_padding(model) is False


def test_a_pad_that_others_read_stays_for_them() -> None:
    proto, x = padded([0, 0, 1, 1, 0, 0, 1, 1]), models.images()
    proto.graph.node.insert(2, models.node("GlobalMaxPool", "wide", "most"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("most", 1, ("batch", 3, 1, 1)))
    model = ir.from_proto(proto)
    assert folding.fold_padding(model) is True
    assert next(iter(model.graph)).op_type == "Pad"
    actual, expected = (oracle.values(each, x, ["most", "logits"]) for each in (model, proto))
    for name in ("most", "logits"):
        oracle.assert_close(actual[name], expected[name], ROUNDING)


@pytest.mark.parametrize(
    "proto",
    [
        padded([0, 0, 1, 1, 0, 0, 1, 1], np.float32(1)),
        padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"),
        padded([0, 0, -1, 1, 0, 0, 1, 1]),
        padded([1, 0, 1, 1, 0, 0, 1, 1]),
        padded([1, 1, 1, 1], np.float32(0), np.array([2, 3])),
        padded([0, 0, 1, 1, 0, 0, 1, 1], auto_pad="SAME_UPPER"),
    ],
    ids=["ones", "reflected", "cropped", "batch", "axes", "same"],
)
def test_other_padding_stays(proto: onnx.ModelProto) -> None:
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString()
    assert folding.fold_padding(model) is False
    assert ir.to_proto(model).SerializeToString() == before

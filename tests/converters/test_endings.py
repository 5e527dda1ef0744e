"""The logits are found however a classifier ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import ModelError
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]


def ending(
    nodes: models.Nodes, outputs: dict[str, models.Shape], kinds: dict[str, int] | None = None
) -> onnx.ModelProto:
    """A Gemm to `scores`, then `nodes`; `kinds` are the types of outputs that are not float32."""
    tensors = {"fc.weight": models.weights(models.CLASSES, models.PIXELS)}
    model = models.assemble(models.linear("scores") + nodes, tensors, outputs=outputs)
    for output in model.graph.output:
        output.type.tensor_type.elem_type = (kinds or {}).get(output.name, TensorProto.FLOAT)
    return model


SOFTMAX = models.node("Softmax", "scores", "probabilities", axis=-1)
LABEL = models.node("ArgMax", "scores", "label", axis=1, keepdims=0)
INTEGER = {"label": TensorProto.INT64}
ENDINGS: dict[str, tuple[onnx.ModelProto, str]] = {
    "softmax": (ending([SOFTMAX], {"probabilities": models.LOGITS}), "softmax"),
    "sigmoid": (ending([models.node("Sigmoid", "scores", "shares")], {"shares": models.LOGITS}), "sigmoid"),
    "label": (ending([LABEL], {"label": ("batch",)}, INTEGER), "argmax"),
    "label of the softmax": (
        ending([SOFTMAX, models.node("ArgMax", "probabilities", "label", axis=1)], {"label": ("batch", 1)}, INTEGER),
        "argmax",
    ),
    "label and probabilities": (
        ending([LABEL, SOFTMAX], {"label": ("batch",), "probabilities": models.LOGITS}, INTEGER),
        "argmax",
    ),
    "logits and probabilities": (
        ending([SOFTMAX], {"scores": models.LOGITS, "probabilities": models.LOGITS}),
        "logits",
    ),
    "embedding beside the logits": (
        ending([], {"flat": ("batch", models.PIXELS), "scores": models.LOGITS}),
        "logits",
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_logits_are_found(load: Load, name: str) -> None:
    """The module and onnxruntime's session on the file both give the Gemm's output."""
    model, kind = ENDINGS[name]
    classifier, x = load(model), models.images(3)
    expected = oracle.run(ending([], {"scores": models.LOGITS}), x)
    assert classifier.output_kind == kind
    assert classifier.logits == "scores"
    oracle.assert_close(to_torch(classifier)(torch.from_numpy(x)).numpy(), expected, 1e-5)
    oracle.assert_close(classifier.session().run(x)[0], expected, 1e-5)


def test_what_is_left_alone_is_told(load: Load) -> None:
    (note,) = load(ENDINGS["embedding beside the logits"][0]).notes
    assert "scores is taken" in note
    assert "flat left alone" in note
    assert load(ENDINGS["softmax"][0]).notes == ()


def test_map_of_one_pixel_is_a_vector(load: Load) -> None:
    """[N, classes, 1, 1], as SqueezeNet has it."""
    model, x = models.batchnorm_last(), models.images(3)
    logits = to_torch(load(model))(torch.from_numpy(x)).numpy()
    oracle.assert_close(logits, np.asarray(oracle.run(model, x)).reshape(3, models.CLASSES), 1e-5)


def test_heads_of_unlike_sizes_are_refused(load: Load) -> None:
    with pytest.raises(ModelError, match=r"2 outputs \(boxes, scores\) of unlike sizes"):
        load(models.detector())

"""Removing channels: the smaller file computes what the whole model does without what the channels feed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch

from converters import writeback
from converters.channel_cuts import Channels
from converters.channels import find_channels
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.numbering import FIXED
from converters.torch_module import TorchClassifier
from tests import models
from tests.models import assemble, head, head_tensors, node, weights

Load = Callable[[onnx.ModelProto], Classifier]


def prepared_module(classifier: Classifier) -> TorchClassifier:
    return to_torch(writeback.prepare_for_pruning(classifier), check=False)


def difference(module: TorchClassifier, channels: Channels, removed: np.ndarray) -> float:
    """Between the cut file in onnxruntime and the whole module whose readers have zeros for the removed channels."""
    parameters = {}
    for entry in channels.layers:
        weight = module.constant(entry.layer.weight).clone()
        if entry.inputs is not None:
            gone = torch.from_numpy(np.flatnonzero(np.isin(entry.inputs, removed)))
            weight.index_fill_(1 - entry.layer.axis, gone, 0.0)
        parameters[entry.layer.weight] = weight
    spec = module.spec
    pixels = torch.rand(3, spec.channel_count, *spec.size, generator=torch.Generator().manual_seed(0))
    x = spec.to_input(pixels).contiguous()
    expected = module.whole({module.input_name: x}, parameters)[module.logits_name].numpy()
    edits = channels.edits(removed, {}, module.constant)
    cut = writeback.edited_classifier(module.classifier, edits)
    batch = module.classifier.fixed_batch or 3
    actual = cut.session(optimise=False).run_in_batches(x.numpy(), batch).reshape(expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def some(channels: Channels, share: float, seed: int = 0) -> np.ndarray:
    """A share of the channels, drawn by lot, but for one of each value."""
    lot = np.random.default_rng(seed)
    numbers = channels.numbers()
    drawn = lot.choice(numbers, round(share * len(numbers)), replace=False)
    return np.setdiff1d(drawn, channels.needed(lot.random(1 + numbers.max(initial=0))))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_any_channels_of_the_embedded_models_can_go(embedded: Classifier, share: float) -> None:
    module = prepared_module(embedded)
    channels = find_channels(module)
    for seed in range(2):
        removed = some(channels, share, seed)
        assert difference(module, channels, removed) < 1e-5
        edits = channels.edits(removed, {}, module.constant)
        left = writeback.edited_classifier(module.classifier, edits).parameter_count()
        assert left < (1 - share / 2) * module.classifier.parameter_count() or embedded.name in ("attention", "shuffle")
        assert left < module.classifier.parameter_count()


def test_the_image_and_the_logits_stay(embedded: Classifier) -> None:
    channels = find_channels(prepared_module(embedded))
    first, last = channels.layers[0], channels.layers[-1]
    assert first.inputs is not None
    assert (first.inputs == FIXED).all()
    assert (last.outputs == FIXED).all()


@pytest.mark.parametrize(
    ("name", "removable"),
    [
        ("plain", 304),
        ("residual", 232),
        ("inverted", 880),
        ("inverted_folded", 880),
        ("dense", 624),
        ("excite", 810),
        ("attention", 428),
    ],
)
def test_what_can_go(name: str, removable: int) -> None:
    """Counted by hand: the sum of the widths, residual sums, depthwise layers and gates counted once."""
    from converters.load import load_classifier
    from recipes import zoo

    channels = find_channels(prepared_module(load_classifier(zoo.model_path(name))))
    assert len(channels.numbers()) == removable


def two_branches(join: str) -> onnx.ModelProto:
    """Two convolutions of four channels, joined by an operator, and a head."""
    nodes = [
        node("Conv", "image a.weight", "a"),
        node("Conv", "image b.weight", "b"),
        node(join, "a b", "joined", **({"axis": 1} if join == "Concat" else {})),
    ]
    width = 8 if join == "Concat" else 4
    tensors = {"a.weight": weights(4, models.CHANNELS, 3, 3), "b.weight": weights(4, models.CHANNELS, 3, 3, seed=1)}
    return assemble(nodes + head("joined"), tensors | head_tensors(width))


@pytest.mark.parametrize(("join", "groups"), [("Add", 4), ("Mul", 4), ("Concat", 8)])
def test_branches(join: str, groups: int, load: Load) -> None:
    """What is added goes together; what stands side by side goes alone."""
    module = prepared_module(load(two_branches(join)))
    channels = find_channels(module)
    numbers = channels.numbers()
    assert len(numbers) == groups
    assert difference(module, channels, numbers[1:3]) < 1e-5


def test_what_meets_the_image_stays(load: Load) -> None:
    nodes = [
        node("Conv", "image a.weight", "a", pads=[1, 1, 1, 1]),
        node("Add", "a image", "sum"),
    ]
    tensors = {"a.weight": weights(models.CHANNELS, models.CHANNELS, 3, 3)}
    channels = find_channels(
        prepared_module(load(assemble(nodes + head("sum"), tensors | head_tensors(models.CHANNELS))))
    )
    assert len(channels.numbers()) == 0


@pytest.mark.parametrize("build", [models.split, models.smooth, models.shared_weight])
def test_graphs_that_are_hard_to_cut(build: Callable[[], onnx.ModelProto], load: Load) -> None:
    """A Split, a grouped convolution, one weight read twice: whatever can go, goes without a trace."""
    module = prepared_module(load(build()))
    channels = find_channels(module)
    for number in channels.numbers():
        assert difference(module, channels, np.array([number])) < 1e-5


def test_what_is_read_by_a_weight_that_comes_first_stays(load: Load) -> None:
    """[6, 8] times [N, 8, places] mixes channels: what it reads and writes stays, what lies before can go."""
    nodes = [
        node("Conv", "image a.weight", "a", pads=[1, 1, 1, 1]),
        node("Relu", "a", "b"),
        node("Conv", "b c.weight", "c", pads=[1, 1, 1, 1]),
        node("Reshape", "c rows", "tokens"),
        node("MatMul", "mix.weight tokens", "mixed"),
        node("Reshape", "mixed map", "d"),
        *head("d"),
    ]
    tensors = {
        "a.weight": weights(8, models.CHANNELS, 3, 3),
        "c.weight": weights(8, 8, 3, 3, seed=1),
        "rows": np.array([0, 8, models.SIDE**2], np.int64),
        "map": np.array([0, 6, models.SIDE, models.SIDE], np.int64),
        "mix.weight": weights(6, 8, seed=2),
    }
    module = prepared_module(load(assemble(nodes, {**tensors, **head_tensors(6)})))
    channels = find_channels(module)
    assert len(channels.numbers()) == 8
    assert difference(module, channels, channels.numbers()[:4]) < 1e-5


def test_softmax_and_layer_norm_along_channels_hold_them(load: Load) -> None:
    for op, extra, tensors in (
        ("Softmax", "", {}),
        ("LayerNormalization", " scale", {"scale": np.ones(5, np.float32)}),
    ):
        nodes = [
            node("Flatten", "image", "flat"),
            node("MatMul", "flat a.weight", "a"),
            node(op, f"a{extra}", "b", axis=-1),
            node("MatMul", "b fc.weight", "logits"),
        ]
        given = {"a.weight": weights(models.PIXELS, 5), "fc.weight": weights(5, models.CLASSES), **tensors}
        assert len(find_channels(prepared_module(load(assemble(nodes, given)))).numbers()) == 0


AUXILIARY = [
    node("Conv", "a aux.weight", "side"),
    node("GlobalMaxPool", "side", "top"),
    node("Flatten", "top", "beside"),
]


@pytest.mark.parametrize(
    ("nodes", "width", "removable"),
    [
        ([node("Identity", "flat", "beside")], 8, "a"),
        (AUXILIARY, models.CLASSES, "b"),
        ([node("Softmax", "logits", "beside", axis=1)], models.CLASSES, "ab"),
    ],
)
def test_other_outputs_keep_their_width(nodes: list[onnx.NodeProto], width: int, removable: str, load: Load) -> None:
    """An embedding keeps its width, an auxiliary head what it reads; what comes of the logits asks nothing."""
    tensors = {
        "a.weight": weights(8, models.CHANNELS, 3, 3),
        "b.weight": weights(8, 8, 3, 3, seed=1),
        "aux.weight": weights(models.CLASSES, 8, 1, 1, seed=2),
    }
    way = [node("Conv", "image a.weight", "a"), node("Conv", "a b.weight", "b"), *head("b")]
    outputs = {"logits": models.LOGITS, "beside": ("batch", width)}
    module = prepared_module(load(assemble(way + nodes, tensors | head_tensors(8), outputs=outputs)))
    channels = find_channels(module)
    assert {entry.layer.output for entry in channels.layers if entry.outputs.any()} == set(removable)
    assert difference(module, channels, channels.numbers()[:3]) < 1e-5
    cut = writeback.edited_classifier(module.classifier, channels.edits(channels.numbers()[:3], {}, module.constant))
    image = models.images()
    before, after = (found.session(optimise=False).run(image) for found in (module.classifier, cut))
    assert [value.shape for value in after] == [value.shape for value in before]

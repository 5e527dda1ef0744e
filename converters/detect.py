"""Which pixels a model expects, judged from the model alone.

Two witnesses are heard, in this order.

1. Arithmetic at the head of the graph. What the first nodes do to each channel, before anything else, is a x + b; where
   that comes to a known normalisation, the image goes in before it, and the range of x is known. An input of bytes
   says as much by its type.
2. The first BatchNorm, which stored mean and deviation of what it read in training. For each known normalisation,
   photographs go through the layers before it; the right one gives the stored numbers back. The misfit of a channel is
   (m - mu)^2 / (s^2 + sigma^2) + log(s / sigma)^2, and a candidate's the mean over the three quarters of the channels
   that it fits best: trained nets have dead ones among the first, which no image gives back. Two orders of channels are
   compared over all of them, as few filters tell red from blue.

Nothing else in a trained file tells the range well enough: a model without either is left to the user.

The photographs are eight crops of four pictures in the public domain (NASA, SpaceX, S. van der Walt, R. Michetti).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from PIL import Image
from torch import Tensor

from converters import graphs
from converters.classifier import Classifier
from converters.errors import ModelError
from converters.input_spec import IMAGENET_MEAN, IMAGENET_STD, Detection, InputSpec
from converters.runtime import Session

PHOTOGRAPHS, PHOTOGRAPH_SIDE = "photographs.jpg", 128
LEAST_CONFIDENCE = 0.6
"""A normalisation is believed from here on: the misfit of the next is at least half as large again (0.6 / 0.4)."""
FITTING = 0.75
"""Share of the channels that a normalisation is judged by."""
MOST_MISFIT = 1.0
"""Misfit of a normalisation that is off by more than a factor of e in most channels: the best of several bad ones."""
LEAST_ORDER_CONFIDENCE = 0.54
"""An unusual channel order is believed from here on; photographs have nearly the same statistics in red and blue."""
NEAR = 0.03
"""Relative difference up to which two normalisations are the same: 127 and 128 are 127.5."""
RANGES = (1.0, 255.0)


@dataclass(frozen=True)
class Known:
    """A normalisation in use: (scale * pixel - mean) / std, in RGB order; the usual channel order stands first."""

    name: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    orders: tuple[str, ...] = ("rgb", "bgr")

    def keys(self, order: str) -> dict[str, Any]:
        """Input-spec keys, in the model's channel order; gray takes the mean of the three."""
        mean, std = self.mean, self.std
        if order == "gray":
            mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
        elif order == "bgr":
            mean, std = mean[::-1], std[::-1]
        return {"scale": self.scale, "mean": mean, "std": std, "channels": order}


KNOWN = (
    Known("ImageNet", 1.0, IMAGENET_MEAN, IMAGENET_STD),
    Known("-1 to 1", 1.0, (0.5,) * 3, (0.5,) * 3),
    Known("0 to 1", 1.0, (0.0,) * 3, (1.0,) * 3),
    Known("0 to 255", 255.0, (0.0,) * 3, (1.0,) * 3),
    Known("0 to 255 minus mean", 255.0, (123.68, 116.779, 103.939), (1.0,) * 3, ("bgr", "rgb")),
)


def detect(classifier: Classifier, options: Mapping[str, Any]) -> Detection | None:
    """What the model says of its input, or None where it says nothing that can be relied on.

    `options` are input-spec keys that are settled already; of these, `channels` leaves only its own order.
    """
    channels = classifier.spec.channel_count
    if channels not in (1, 3):
        return None
    wanted = options.get("channels")
    orders = ("gray",) if channels == 1 else (wanted,) if wanted in ("rgb", "bgr") else ("rgb", "bgr")
    found = _by_arithmetic(classifier, orders)
    return found if found is not None else _by_statistics(classifier, orders)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@dataclass
class Affine:
    """What the head of a graph does to each channel of the image: factor * x + offset [C], channels in `order`."""

    factor: NDArray[np.float64]
    offset: NDArray[np.float64]
    order: list[int]
    nodes: int = 0

    def by_input_channel(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        places = np.argsort(self.order)
        return self.factor[places], self.offset[places]


def head_arithmetic(graph: ir.Graph, channels: int, axis: int) -> Affine:
    """Follow the image, whose channels are on `axis`, as long as one node after another only scales and shifts it."""
    value = graphs.image_input(graph)
    found = Affine(np.ones(channels), np.zeros(channels), list(range(channels)))
    while len(uses := list(value.uses())) == 1 and not value.is_graph_output():
        node, index = uses[0]
        if node.op_type == "Transpose":
            axis = list(graphs.ints(node, "perm") or [3, 2, 1, 0]).index(axis)
        elif node.op_type in ("Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
            numbers = _per_channel(node.inputs[1 - index], channels, axis)
            if numbers is None or not _apply(found, node.op_type, numbers, first=index == 0):
                break
            found.nodes += 1
        elif node.op_type == "Gather" and index == 0 and graphs.integer(node, "axis", 0) % 4 == axis:
            taken = graphs.constant_behind(node.inputs[1])
            chosen = [] if taken is None else [int(i) % channels for i in graphs.to_numpy(taken).ravel()]
            if sorted(chosen) != list(range(channels)):
                break
            found.factor, found.offset = found.factor[chosen], found.offset[chosen]
            found.order = [found.order[i] for i in chosen]
        elif node.op_type not in ("Cast", "Identity", "Dropout"):
            break
        value = node.outputs[0]
    return found


def _per_channel(value: ir.Value | None, channels: int, axis: int) -> NDArray[np.float64] | None:
    """A constant as one number a channel; None where it is computed or varies over the image."""
    constant = graphs.constant_behind(value)
    if constant is None:
        return None
    numbers = graphs.to_numpy(constant).astype(np.float64)
    if numbers.size == 1:
        return np.full(channels, numbers.item())
    along = axis - 4 + numbers.ndim  # shapes are aligned at their ends
    fits = numbers.size == channels and along >= 0 and numbers.shape[along] == channels
    return numbers.ravel() if fits else None


def _apply(found: Affine, op: str, numbers: NDArray[np.float64], *, first: bool) -> bool:
    """Compose with x op numbers, or numbers op x; False for numbers / x."""
    match op:
        case "Add":
            found.offset = found.offset + numbers
        case "Sub" if first:
            found.offset = found.offset - numbers
        case "Sub":
            found.factor, found.offset = -found.factor, numbers - found.offset
        case "Mul":
            found.factor, found.offset = found.factor * numbers, found.offset * numbers
        case "Div" if first and numbers.all():
            found.factor, found.offset = found.factor / numbers, found.offset / numbers
        case _:
            return False
    return True


def _by_arithmetic(classifier: Classifier, orders: tuple[str, ...]) -> Detection | None:
    spec, is_bytes = classifier.spec, classifier.image_type == ir.DataType.UINT8
    affine = head_arithmetic(classifier.normal.graph, spec.channel_count, 1 if spec.layout == "NCHW" else 3)
    factor, offset = affine.by_input_channel()
    ones, zeros = (1.0,) * spec.channel_count, (0.0,) * spec.channel_count
    matches = []
    for limit in RANGES[1:] if is_bytes else RANGES:
        for known in KNOWN if affine.nodes else ():
            for order in orders:
                keys = known.keys(order)
                mean, std = np.array(keys["mean"]), np.array(keys["std"])
                wanted_factor, wanted_offset = known.scale / (limit * std), -mean / std
                worst = max(
                    float(np.abs(factor / wanted_factor - 1).max()),
                    float((np.abs(offset - wanted_offset) / np.maximum(1, np.abs(wanted_offset))).max()),
                )
                matches.append((worst, known.name, limit, order))
    worst, name, limit, order = min(matches, default=(np.inf, "", 255.0, orders[0]), key=lambda match: match[0])
    if worst > NEAR and not is_bytes:
        return None
    inside = f", which the graph brings to {name}" if worst <= NEAR else ""
    return Detection(
        keys={"scale": limit, "mean": zeros, "std": ones, "channels": order if worst <= NEAR else orders[0]},
        name=f"0 to {limit:g}",
        confidence=1.0,
        runner_up=None,
        evidence=f"the input takes 0 to {limit:g}{inside}",
    )


# --- statistics -------------------------------------------------------------------------------------------------------


@cache
def photographs() -> Tensor:
    """[16, 3, 128, 128] in [0, 1], each also mirrored; every channel has the mean and deviation that ImageNet has."""
    sheet = Image.open(io.BytesIO(resources.files("converters").joinpath(PHOTOGRAPHS).read_bytes()))
    side = PHOTOGRAPH_SIDE
    corners = [(left, top) for top in range(0, sheet.height, side) for left in range(0, sheet.width, side)]
    tiles = [np.asarray(sheet.crop((left, top, left + side, top + side))) for left, top in corners]
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
    deviation, mean = torch.std_mean(pixels, (0, 2, 3), keepdim=True)
    wanted_mean, wanted_deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((pixels - mean) / deviation * wanted_deviation + wanted_mean).clamp(0, 1)
    return torch.cat([pixels, pixels.flip(3)])


def _first_batchnorm(classifier: Classifier) -> tuple[Session, NDArray[np.float64], NDArray[np.float64]] | None:
    """What computes the input of the first BatchNormalization, and the mean and variance [C] that it stored of that."""
    stretch = classifier.normal.clone()
    for node in stretch.graph:
        stored = [graphs.constant_behind(value) for value in node.inputs[3:5]]
        if node.op_type != "BatchNormalization" or len(stored) < 2 or None in stored or node.inputs[0] is None:
            continue
        mean, variance = (graphs.to_numpy(value).astype(np.float64) for value in stored if value is not None)
        source = node.inputs[0]
        if source.producer() is None:
            relay = ir.node("Identity", [source])
            stretch.graph.insert_before(node, relay)
            source = relay.outputs[0]
            source.name = graphs.unused_name(stretch.graph, "image.read")
        source.type = ir.TensorType(ir.DataType.FLOAT)
        stretch.graph.outputs[:] = [source]
        common.RemoveUnusedNodesPass()(stretch)
        return Session(stretch, name=str(classifier.path)), mean, variance
    return None


def _by_statistics(classifier: Classifier, orders: tuple[str, ...]) -> Detection | None:
    try:
        found = _first_batchnorm(classifier)
        if found is None:
            return None
        session, mean, variance = found
        misfits = {
            known: [_misfits(session, _spec(classifier, known.keys(order)), mean, variance) for order in orders]
            for known in KNOWN
        }
    except ModelError:  # onnxruntime does not run that stretch: no witness
        return None
    by_known = {known: min(map(_of_fitting, found)) for known, found in misfits.items()}
    best, second = sorted(KNOWN, key=lambda known: by_known[known])[:2]
    least, next_least = by_known[best], by_known[second]
    confidence = _share(next_least, least)
    standardised = orders == ("gray",) and best is KNOWN[0]  # by mean and deviation of a data set that nothing tells
    if least > MOST_MISFIT or confidence < LEAST_CONFIDENCE or standardised:
        return None
    by_order = {order: float(found.mean()) for order, found in zip(orders, misfits[best], strict=True)}
    order, doubt = _order(best, orders, by_order)
    evidence = f"photographs give the first BatchNorm's statistics back to {least:.3f} (next: {next_least:.3f})"
    return Detection(best.keys(order), best.name, confidence, second.name, evidence + doubt)


def _of_fitting(misfits: NDArray[np.float64]) -> float:
    """The mean of the share FITTING of one candidate's misfits [C] that is least."""
    return float(np.sort(misfits)[: math.ceil(FITTING * len(misfits))].mean())


def _share(worse: float, better: float) -> float:
    """0.5 where two misfits are equal, towards 1 where one is far better."""
    return worse / max(worse + better, 1e-12)


def _order(known: Known, orders: tuple[str, ...], misfits: Mapping[str, float]) -> tuple[str, str]:
    """The channel order, the usual one unless another fits clearly better, and a remark where it cannot be told."""
    usual = next((order for order in known.orders if order in orders), orders[0])
    best = min(misfits, key=lambda order: misfits[order])
    if len(orders) < 2:
        return usual, ""
    confidence = _share(max(misfits.values()), min(misfits.values()))
    if confidence >= LEAST_ORDER_CONFIDENCE:
        return best, ""
    return usual, f"; its channel order cannot be told, {usual} is usual"


def _spec(classifier: Classifier, keys: Mapping[str, Any]) -> InputSpec:
    return InputSpec(size=classifier.spec.size, layout=classifier.spec.layout, **keys)


def _misfits(
    session: Session, spec: InputSpec, mean: NDArray[np.float64], variance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of each channel [C]."""
    pixels = photographs()
    values = np.asarray(session.run(spec.to_input(pixels).contiguous().numpy())[0], np.float64)
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    found_mean, found_variance, variance = values.mean(axes), values.var(axes) + 1e-12, variance + 1e-12
    shift = (found_mean - mean) ** 2 / (found_variance + variance)
    return shift + (0.5 * np.log(found_variance / variance)) ** 2

"""The quantizers of a model in tables, and what they come to in its graph: edits, the size of the file, the account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters import writeback
from converters.edits import BIAS, ActivationEdit, BiasEdit, Edit, TensorEdit, WeightEdit, apply_edits
from converters.steps import Quantized
from converters.targets import INT32_LIMIT, MAX_BITS, Container, Target
from converters.torch_module import Layer, TorchClassifier
from recipes.account import LayerAccount, account_layer
from recipes.checkpoint import Table
from recipes.quantize.plan import LayerPlan, group_size, plan_values
from recipes.quantize.primitives import Granularity
from recipes.quantize.proof import quantized_values
from recipes.quantize.quantizers import QuantizedActivation, QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import Changes, LearnedTensor

BIAS_LIMIT = 2**30
"""Largest bias on its grid: half of what 32 bits hold, the products that it is added to being the other."""


@dataclass
class Quantizers:
    """Of the weights, biases (by initializer name) and values (by value name) of one model; weights as `plans` say."""

    module: TorchClassifier
    target: Target
    biases: dict[str, LearnedTensor]
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    values: dict[str, QuantizedActivation] = field(default_factory=dict)
    plans: list[LayerPlan] = field(default_factory=list)

    @property
    def changes(self) -> Changes:
        return Changes((self.weights, self.biases), self.values)

    @property
    def tables(self) -> dict[str, Table]:
        """Whose states make up the state of a run."""
        return {"weights": self.weights, "biases": self.biases, "values": self.values}

    def bias(self, layer: Layer) -> LearnedTensor | None:
        return self.biases[layer.bias] if layer.bias is not None else None

    def snap_biases(self, layers: Sequence[Layer]) -> None:
        """Bring biases of fully quantized layers to whole multiples of input scale times weight scale.

        Integer kernels add the bias to products on that grid, in 32 bits, and onnxruntime rounds it so when it fuses;
        at 4 bits the grid is coarse enough to be felt, so the simulation and the file have it too. A channel that is
        all but dead beside its bias gets a scale by which that fits; what its weights add would be lost in it anyway.
        """
        for layer in layers:
            bias = self.bias(layer)
            if bias is not None and layer.input in self.values:
                value = self.values[layer.input]
                if value.bits <= MAX_BITS:  # of wider ones no kernel adds integers
                    self.weights[layer.weight].coarsen(bias.value.abs() / (float(value.scale) * BIAS_LIMIT))
                grid = self._bias_grid(layer)
                bias.value = torch.round(bias.value / grid) * grid

    def _bias_grid(self, layer: Layer) -> Tensor:
        """[C]: input scale times weight scale."""
        return self.values[layer.input].scale * self.weights[layer.weight].scale.flatten()

    def quantized(self) -> Quantized | None:
        """The quantized activations, for the proof of the file; None where all are float."""
        return quantized_values(self.module, self.values, self.changes) if self.values else None

    def edits(self) -> list[Edit]:
        """What to write into the graph, in its order."""
        found: list[Edit] = []
        for plan in self.plans:
            layer, weight = plan.layer, self.weights[plan.layer.weight]
            container = self.target.weight_container(weight.bits)
            integers, zero = (tensor.cpu().numpy().astype("int32") for tensor in (weight.integers(), weight.zero))
            scale = weight.current_scale().cpu().numpy()
            found.append(_weight_edit(layer, integers, scale, zero, weight.granularity, weight.bits, container))
            found += self._bias_edits(layer)
        for name in self.module.values:
            value = self.values.get(name)
            if value is None:
                continue
            container = self.target.activation_container(value.bits)
            found.append(ActivationEdit(name, float(value.scale), int(value.zero), value.bits, container))
        return found

    def _bias_edits(self, layer: Layer) -> list[Edit]:
        """What to write for a layer's bias: integers for integer kernels, nothing where it is as it was."""
        if layer.bias is None:
            return []
        bias = self.biases[layer.bias].tensor().cpu()
        if self.target.integer_kernels and layer.input in self.values:
            grid = self._bias_grid(layer).cpu()
            integers = torch.round(bias.double() / grid.double())
            if integers.numel() == len(grid) and bool((integers.abs() <= INT32_LIMIT).all()):
                return [BiasEdit(layer.output, integers.flatten().numpy().astype("int32"), grid.numpy())]
        if torch.equal(bias, self.module.constant(layer.bias).cpu()):
            return []
        return [TensorEdit(layer.output, BIAS, bias.numpy())]

    def layer_accounts(self) -> list[LayerAccount]:
        return [
            account_layer(
                plan.layer.name,
                self.module.constant(plan.layer.weight),
                self.weights[plan.layer.weight].tensor(),
                bits=plan.bits,
                act_bits=plan.act_bits,
                undecided=self.weights[plan.layer.weight].left_undecided,
                reason=plan.reason,
            )
            for plan in self.plans
        ]


def _weight_edit(
    layer: Layer,
    integers: NDArray[np.int32],
    scale: NDArray[np.float32],
    zero: NDArray[np.int32],
    granularity: Granularity,
    bits: int,
    container: Container,
) -> WeightEdit:
    """Scales and zero points come in the granularity's shape; the file has a list of them where there are no groups."""
    size, axis = granularity.size, granularity.axis
    if size:
        return WeightEdit(layer.output, integers, scale, zero, 1 - axis, bits, container, layer.operand, size)
    return WeightEdit(layer.output, integers, scale.ravel(), zero.ravel(), axis, bits, container, layer.operand)


def file_size(
    module: TorchClassifier,
    plans: Sequence[LayerPlan],
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    metadata: Mapping[str, str],
) -> int:
    """Bytes of the file that a placement is written as: they do not depend on the numbers in it."""
    edits: list[Edit] = []
    for plan in plans:
        layer, container = plan.layer, target.weight_container(plan.bits)
        size = group_size(layer, plan.bits, plan.act_bits, target, settings)
        granularity = Granularity(layer.shape, layer.axis, size)
        zeros, scale = np.zeros(granularity.scales, np.int32), np.ones(granularity.scales, np.float32)
        empty = np.zeros(layer.shape, np.int32)
        edits.append(_weight_edit(layer, empty, scale, zeros, granularity, plan.bits, container))
        if layer.bias is not None and target.integer_kernels and plan.act_bits is not None:
            edits.append(BiasEdit(layer.output, zeros.ravel(), scale.ravel()))
        elif layer.bias is not None and (settings.bias_rate or settings.compensate or plan.act_bits is not None):
            shape = tuple(module.constant(layer.bias).shape)  # of one that several layers may share, and each change
            if plan.act_bits is not None:
                shape = np.broadcast_shapes(shape, layer.shape[layer.axis])
            edits.append(TensorEdit(layer.output, BIAS, np.zeros(shape, np.float32)))
    for name, bits in plan_values(module, plans, act_bits, target).items():
        edits.append(ActivationEdit(name, 1.0, 0, bits, target.activation_container(bits)))
    model = apply_edits(module.classifier.original, edits)
    writeback.stamp(model, metadata)
    return writeback.stored_size(model)

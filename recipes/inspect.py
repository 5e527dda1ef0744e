"""What a model is, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.torch_module import TorchClassifier, Unsupported, to_torch, unsupported_operators
from converters.writeback import prepare_for_quantization
from recipes.blocks import Block, find_blocks


@dataclass(frozen=True)
class Inspection:
    """Facts of one classifier. `macs` are multiply-accumulates for one image; None where it cannot be converted."""

    classifier: Classifier
    classes: int | None
    parameters: int
    macs: int | None
    batchnorms: int
    folded: int
    """Convolutions with a bias and no BatchNorm behind them: where a fold has most likely happened."""
    blocks: list[Block]
    unsupported: list[Unsupported]
    obstacle: str | None = None
    """Why a graph that converts cannot be written back in few bits."""

    @property
    def why_not_quantize(self) -> str | None:
        """What keeps the model from being quantized, or None."""
        if self.classifier.quantized:
            return "it is quantized already: give the float model that it was made from"
        if self.unsupported:
            return self._unsupported
        return self.obstacle if self.blocks else "it has no weighted layer"

    @property
    def why_not_synthesize(self) -> str | None:
        """What keeps images from being made from the model alone, or None."""
        return self._unsupported if self.unsupported else None

    @property
    def _unsupported(self) -> str:
        return "; ".join(str(operator) for operator in self.unsupported)


def inspect_model(classifier: Classifier) -> Inspection:
    """Convert, check against onnxruntime and count. Raises ModelError for a model that is no classifier."""
    unsupported = unsupported_operators(classifier)
    parameters = classifier.parameter_count()
    if unsupported:
        return Inspection(classifier, None, parameters, None, 0, 0, [], unsupported)
    module = to_torch(classifier)
    norms = module.batchnorms()
    read = {norm.input for norm in norms}
    layers = module.layers()
    folded = sum(layer.op == "Conv" and layer.bias is not None and layer.output not in read for layer in layers)
    classes, macs = _count(module)
    blocks, obstacle = find_blocks(module), _obstacle(classifier)
    return Inspection(classifier, classes, parameters, macs, len(norms), folded, blocks, [], obstacle)


def _obstacle(classifier: Classifier) -> str | None:
    if classifier.quantized:
        return None
    try:
        prepare_for_quantization(classifier, four_bit=True)
    except MixMixError as error:
        return str(error).removeprefix(f"{classifier.path}: ")
    return None


@torch.no_grad()
def layer_outputs(module: TorchClassifier) -> dict[str, Tensor]:
    """What the weighted layers, and the logits, are for one black image, by value name."""
    outputs = list(dict.fromkeys([layer.output for layer in module.layers()] + [module.logits_name]))
    height, width = module.spec.size
    pixels = torch.zeros(1, module.spec.channel_count, height, width)
    return module.segment([module.input_name], outputs)({module.input_name: module.spec.to_input(pixels)})


def _count(module: TorchClassifier) -> tuple[int, int]:
    """Classes, and multiply-accumulates of the weighted layers for one image."""
    values, macs = layer_outputs(module), 0
    for layer in module.layers():
        result = values[layer.output]
        channels = layer.shape[layer.axis]
        macs += layer.parameters * (result.numel() // channels)
    return values[module.logits_name].shape[1], macs

"""What a model is, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.load import Classifier
from converters.torch_module import TorchClassifier, to_torch, unsupported_operators
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
    unsupported: list[tuple[str, int, str]]

    @property
    def can_quantize(self) -> bool:
        return bool(self.blocks)

    @property
    def can_synthesize(self) -> bool:
        return not self.unsupported and self.batchnorms > 0


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
    return Inspection(classifier, classes, parameters, macs, len(norms), folded, find_blocks(module), [])


@torch.no_grad()
def _count(module: TorchClassifier) -> tuple[int, int]:
    """Classes, and multiply-accumulates of the weighted layers for one image."""
    layers = module.layers()
    outputs = list(dict.fromkeys([layer.output for layer in layers] + [module.logits_name]))
    height, width = module.spec.size
    pixels = torch.zeros(1, module.spec.channel_count, height, width)
    values = module.segment([module.input_name], outputs)({module.input_name: module.spec.to_input(pixels)})
    macs = 0
    for layer in layers:
        result = values[layer.output]
        channels = layer.shape[layer.axis]
        macs += layer.parameters * (result.numel() // channels)
    return values[module.logits_name].shape[1], macs

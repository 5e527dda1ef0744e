"""What a model is, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from converters.classifier import Classifier
from converters.conversion import Unsupported, to_torch, unsupported_operators
from converters.errors import MixMixError
from converters.targets import MIN_BITS, PORTABLE
from converters.torch_module import Layer, TorchClassifier
from converters.writeback import prepare_for_quantization
from recipes.blocks import Block, find_blocks
from recipes.evenness import biased_convolutions, even_values
from recipes.patterns import NofM


@dataclass(frozen=True)
class LayerZeros:
    """The zeros in one layer's weight, and whether they are in the pattern that was asked about."""

    name: str
    weights: int
    zeros: int
    obeys: bool | None
    """None where no pattern was asked about, or it does not fit the layer."""


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
    zeros: list[LayerZeros] = field(default_factory=list)
    shaping: int = 0
    """Values whose channels images can be asked to make even."""

    @property
    def sparsity(self) -> float:
        """Share of the weights of all layers that are zero."""
        return sum(layer.zeros for layer in self.zeros) / max(1, sum(layer.weights for layer in self.zeros))

    @property
    def has_pattern(self) -> bool:
        """Whether some layer can have the pattern that was asked about, and all that can have it."""
        asked = [layer.obeys for layer in self.zeros if layer.obeys is not None]
        return bool(asked) and all(asked)

    @property
    def why_not_prune(self) -> str | None:
        """What keeps the model from being pruned, or None."""
        if self.classifier.quantized:
            return "it is quantized already: give the float model that it was made from"
        if self.unsupported:
            return self._unsupported
        return None if self.blocks else "it has no weighted layer"

    @property
    def why_not_quantize(self) -> str | None:
        """What keeps the model from being quantized, or None."""
        return self.why_not_prune or self.obstacle

    @property
    def why_not_synthesize(self) -> str | None:
        """What keeps images from being made from the model alone, or None."""
        if self.unsupported:
            return self._unsupported
        if self.classes == 1 and not self.batchnorms and not self.shaping:
            return "it has a single logit, and neither BatchNorm statistics nor even channels: give images with --data"
        return None

    @property
    def _unsupported(self) -> str:
        kinds: dict[str, list[Unsupported]] = {}
        for operator in self.unsupported:
            kinds.setdefault(operator.op, []).append(operator)
        found = []
        for first, *others in kinds.values():
            more = f" ({len(others)} more of them)" if others else ""
            found.append(f"{first}{more}")
        return "; ".join(found)


def inspect_model(classifier: Classifier, pattern: NofM | None = None) -> Inspection:
    """Convert, check against onnxruntime and count; with a `pattern`, say which layers have it.

    Raises ModelError for a model that is no classifier.
    """
    unsupported = unsupported_operators(classifier)
    parameters = classifier.parameter_count()
    if unsupported:
        return Inspection(classifier, None, parameters, None, 0, 0, [], unsupported)
    module = to_torch(classifier)
    norms = module.batchnorms()
    read = {norm.input for norm in norms}
    layers = module.layers()
    folded = sum(not read.intersection((name, end.name)) for name, end in biased_convolutions(module).items())
    values = layer_outputs(module)
    classes, macs = values[module.logits_name].shape[1], sum(_macs(module, values).values())
    shaping = len(even_values(module))
    blocks, obstacle = [block for block in find_blocks(module) if block.layers], _obstacle(classifier)
    zeros = [_zeros(layer, module.constant(layer.weight), pattern) for layer in layers]
    return Inspection(classifier, classes, parameters, macs, len(norms), folded, blocks, [], obstacle, zeros, shaping)


def _zeros(layer: Layer, weight: Tensor, pattern: NofM | None) -> LayerZeros:
    obeys = None if pattern is None or not pattern.fits(layer) else pattern.obeyed_by(weight, layer)
    return LayerZeros(layer.name, weight.numel(), int((weight == 0).sum()), obeys)


def _obstacle(classifier: Classifier) -> str | None:
    if classifier.quantized:
        return None
    try:
        prepare_for_quantization(classifier, PORTABLE, MIN_BITS)
    except MixMixError as error:
        return str(error).removeprefix(f"{classifier.path}: ")
    return None


@torch.no_grad()
def layer_outputs(module: TorchClassifier) -> dict[str, Tensor]:
    """What the weighted layers, and the logits, are for one black image, by value name."""
    outputs = list(dict.fromkeys([layer.output for layer in module.layers()] + [module.logits_name]))
    return module.segment([module.input_name], outputs)({module.input_name: module.black_image()})


def layer_macs(module: TorchClassifier) -> dict[str, int]:
    """Multiply-accumulates of every weighted layer for one image, by layer output."""
    return _macs(module, layer_outputs(module))


def _macs(module: TorchClassifier, values: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        layer.output: layer.parameters * (values[layer.output].numel() // layer.shape[layer.axis])
        for layer in module.layers()
    }

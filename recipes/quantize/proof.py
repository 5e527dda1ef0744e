"""What a quantized file is held against: each quantized activation as torch computes it from the others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from converters.steps import Floats, Quantized
from converters.torch_module import TorchClassifier
from recipes.quantize.quantizers import QuantizedActivation
from recipes.reconstruct import Changes


def quantized_values(module: TorchClassifier, values: Mapping[str, QuantizedActivation], changes: Changes) -> Quantized:
    """The quantized activations `values` of the module with all `changes`, and how each comes of the others."""

    def compute(name: str, x: Floats, given: Mapping[str, Floats]) -> Floats:
        image = torch.from_numpy(x).to(module.device)
        if name == module.input_name:
            return np.asarray(values[name](image).cpu())
        tensors = {key: torch.from_numpy(value).to(image) for key, value in given.items() if key != name}
        tensors = {module.input_name: image, **tensors}
        segment = module.segment(list(tensors), [name])
        return np.asarray(segment(tensors, **changes.of(segment))[name].cpu())

    steps = {name: float(value.scale) for name, value in values.items()}
    return Quantized(steps, module.logits_name, compute)

"""Settings of quantization; one TOML file a method stands beside this module."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from recipes.settings import Jitter, LoopSettings, Share

PACKAGE = "recipes.quantize"
LEAST_GROUP = 16
"""Inputs that may share a scale at least: at 16, a weight of 4 bits takes 6.25 with its part of a scale and a zero
point, which is less than 8 without groups."""


class QuantizeSettings(LoopSettings):
    """How bits are chosen and rounding is learned. Rates are Adam learning rates."""

    unit: Literal["none", "layer", "block"]
    """What is reconstructed at once: nothing (nearest rounding), a layer (AdaRound) or a block (BRECQ)."""
    steps: int = Field(default=0, ge=0)
    """Training steps a unit."""
    rounding: Literal["sigmoid", "offset"] = "sigmoid"
    """How rounding is learned: AdaRound's rectified sigmoid, or an offset trained straight through the rounding."""
    rounding_rate: float = Field(default=1e-2, ge=0)
    """Rate of the rounding: of what the sigmoid takes, or of the offset, in quantization steps."""
    scale_rate: float = Field(default=0.0, ge=0)
    """Rate of the weight scales, relative to their size (GENIE-M); 0 fixes them."""
    activation_rate: float = Field(default=0.0, ge=0)
    """Rate of the activation steps, relative to their size (LSQ); 0 fixes them."""
    regulariser: float = Field(default=0.1, ge=0)
    """Weight of the rounding regulariser against a block loss that starts at 1."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps before the regulariser sets in."""
    beta_start: float = Field(default=20.0, gt=0)
    """Exponent of the rounding regulariser where it sets in: a high one lets what is undecided be."""
    beta_end: float = Field(default=2.0, gt=0)
    """Exponent of the rounding regulariser at the end, where all is to be decided."""
    input_drop: float = Field(default=0.0, ge=0, le=1)
    """Share of block-input elements taken from the float model (QDrop)."""
    activation_drop: float = Field(default=0.0, ge=0, le=1)
    """Share of activation elements left unquantized in training (QDrop)."""
    equalise: float = Field(default=0.0, ge=0, le=1)
    """The power of their ranges that channels are divided by before activations get 4 bits or fewer; 0 leaves them."""
    group_size: int = 0
    """Inputs of an output channel that share a scale, 16 at least, where weights are stored in 4 bits or fewer and
    activations are float; 0 for all of them. Smaller groups are more exact, and cost a scale and a zero point each."""
    range_steps: int = Field(default=80, ge=1)
    """How many ranges are tried for each channel of a weight, and for an activation: the full one and ever narrower."""
    range_norm: float = Field(default=2.4, gt=0)
    """Power of the rounding errors whose sum says which range of a weight is best; of activations it is 2."""
    end_bits: int = Field(default=8, ge=2, le=8)
    """Fewest bits of the inputs of the first and the last layer."""
    extra_share: float = Field(default=0.10, ge=0, le=1)
    """How much may be added to the bits asked for, of what lies between them and 8 bits: over all weights, and over all
    inputs of layers."""
    enough_snr: float = Field(default=25.0)
    """Nothing is added beyond the logits' signal-to-noise ratio (dB) of nearest rounding, layer noise added up."""
    sensitive_images: int = Field(default=16, ge=1)
    """Images that the noise of a layer is measured on."""
    train_steps: int = Field(default=0, ge=0)
    """Steps of training the whole network after reconstruction (QAT); 0 leaves it at that."""
    train_batch: int = Field(default=64, ge=2)
    """Images a step of the whole network's training."""
    train_warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the whole network's training in which rates rise from 0."""
    train_rate: float = Field(default=0.1, ge=0)
    """All learning rates of the whole network's training, as a share of those of the reconstruction."""
    train_temperature: float = Field(default=4.0, gt=0)
    """Softens both class distributions in the whole network's training (Hinton et al. 2015)."""
    train_features: float = Field(default=1.0, ge=0)
    """Weight of the blocks' outputs against the divergence of logits."""
    train_mixing: float = Field(default=0.7, ge=0, le=1)
    """Share of the images that are blended with another of the batch."""
    train_shift: float = Field(default=0.1, ge=0, le=0.5)
    """Largest shift of an image, as a share of its side."""
    train_flip: bool = True
    """Mirror half of the images."""
    train_jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast, saturation and hue jitter an image (MixMix, B.3: 0.2, 0.2, 0.2, 0.1)."""
    train_grayscale: float = Field(default=0.0, ge=0, le=1)
    """Share of the images that lose their colour (B.3: 0.2)."""
    train_blur: float = Field(default=0.0, ge=0, le=1)
    """Share of the images that are blurred by a Gaussian of 1 to 2 pixels (B.3: 0.5)."""
    train_milestones: tuple[Share, ...] = ()
    """Shares of the steps after each of which rates are a tenth of what they were (B.3: at 4,000, 10,000 and 20,000);
    none for a half cosine to 0."""
    reduce_range: bool = True
    """At most 7 bits for INT8 weights beside activations of up to 8 bits, where onnxruntime's CPU kernels may take
    them: full 8 bits saturate there on processors without VNNI."""

    @field_validator("group_size")
    @classmethod
    def _worth_it(cls, group_size: int) -> int:
        if group_size and group_size < LEAST_GROUP:
            raise PydanticCustomError("group_size", "of fewer than 16, scales take more room than more bits would")
        return group_size

    @field_validator("steps")
    @classmethod
    def _of_something(cls, steps: int, info: ValidationInfo) -> int:
        if steps and info.data.get("unit") == "none":
            raise PydanticCustomError("steps", "nothing is trained where unit is none: steps=0 goes with it")
        return steps

"""Settings of pruning; one TOML file a method stands beside this module."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.settings import LoopSettings

PACKAGE = "recipes.prune"


class PruneSettings(LoopSettings):
    """How weights are chosen and the rest is trained. Rates are Adam learning rates that fall along a half cosine.

    Without steps of either kind, the choice is all.
    """

    mask_steps: int = Field(default=0, ge=0)
    """Training steps a block of mask and weights together; then the smallest are chosen anew (MixMix, eq. 10)."""
    steps: int = Field(default=0, ge=0)
    """Training steps a block of the weights that stay, their mask frozen (MixMix, eq. 10)."""
    weight_rate: float = Field(default=0.05, ge=0)
    """Rate of the weights, relative to the root mean square of a layer's weights."""
    rate_power: float = Field(default=0.0, ge=0)
    """All rates are multiplied with this power of the block's relative error when its training begins, 1 at most: the
    nearer the block is to the float one, the smaller are the steps that bring it nearer still."""
    mask_rate: float = Field(default=0.03, ge=0)
    """Rate of the mask."""
    settle_steps: int = Field(default=10, ge=1)
    """Conjugate gradients that the weights of a layer are settled with after each stage (`compensate`)."""
    input_drop: float = Field(default=0.0, ge=0, le=1)
    """Share of block-input elements taken from the float model (QDrop)."""
    allocation: Literal["uniform", "global", "sensitivity"] = "sensitivity"
    """How much each layer gives up: all the same; what one threshold over all weights says, each layer's divided by
    their root mean square; or the least noise in the logits, measured layer by layer. Which layers get N:M, where not
    all do, is decided by noise always."""
    dense_first: bool = True
    """Leave the first layer as it is where all layers give up the same: it is small, and everything goes through it."""
    sensitive_images: int = Field(default=32, ge=1)
    """Images that the noise is measured on."""
    least_channels: float = Field(default=0.1, gt=0, lt=1)
    """Smallest share of a layer's channels that stays."""
    multiple: int = Field(default=4, ge=1)
    """What the number of channels that stay is a multiple of, where any go; 1 for any number."""
    most: float = Field(default=0.98, gt=0, lt=1)
    """Largest share of a layer's weights that is removed."""

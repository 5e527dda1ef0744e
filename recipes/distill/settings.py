"""Settings of distillation."""

from __future__ import annotations

from pydantic import Field

from recipes.settings import Settings

PACKAGE = "recipes.distill"


class DistillSettings(Settings):
    """How the student learns."""

    steps: int = Field(ge=1)
    """Training steps."""
    images: int = Field(default=1024, ge=2)
    """How many to make, where none are given: more images help a student, and better ones more."""
    batch: int = Field(default=64, ge=2)
    """Images a step; at least two, as BatchNorm takes its statistics from them."""
    rate: float = Field(default=3e-3, gt=0)
    """Adam's learning rate: a linear rise over `warmup`, then a half cosine to 0."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    temperature: float = Field(default=4.0, gt=0)
    """Softens both class distributions (Hinton et al. 2015)."""
    features: float = Field(default=1.0, ge=0)
    """Weight of the likeness of features against the divergence of logits."""
    mixing: float = Field(default=0.7, ge=0, le=1)
    """Share of the images that are mixed with another of the batch."""
    shift: float = Field(default=0.1, ge=0, le=0.5)
    """Largest shift of an image, as a share of its side."""
    flip: bool = True
    """Mirror half of the images."""
    statistics: bool = True
    """Train BatchNorm on the statistics of each batch, and store those of all images at the end; off: leave what the
    student has."""

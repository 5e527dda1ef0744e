"""What a student of any family can be asked for besides the teacher's classes: its likenesses of images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def likeness(features: Tensor) -> Tensor:
    """Cosine of every two images' features [N, ...], a matrix [N, N]: comparable between networks of any width."""
    rows = F.normalize(features.flatten(1), dim=1)
    return rows @ rows.mT


def likeness_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the two likenesses (similarity-preserving distillation, Tung and Mori 2019)."""
    return (likeness(student) - likeness(teacher)).square().mean()

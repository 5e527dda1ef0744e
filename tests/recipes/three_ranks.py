"""What each process of `test_ranks` does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.augment import Augmentation
from recipes.distill.engine import batch_norm_over
from recipes.distill.losses import likeness_loss
from recipes.images import ImageSet
from recipes.progress import Silent
from recipes.ranks import ALONE, Part, Ranks, join_ranks
from recipes.reconstruct import Group
from recipes.training import Training, divergence, train

MOVES = Augmentation(flip=True, shift=0.25, jitter=(0.2, 0.2, 0.2, 0.1), grayscale=0.2, blur=0.5)
HOW = Training(steps=6, batch=5, warmup=0.0, mixing=0.7, rate_key="rate", augmentation=MOVES)
"""Of 7 images, so that every other batch is of 2, and one of three processes is left without an image."""


def trained(ranks: Ranks) -> list[Tensor]:
    """The tensors of a small network after training in float64, where rounding is far below any mistake."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images, teacher = ImageSet(draw(7, 3, 4, 4).sigmoid()), draw(48, 3)
    kernel, scale, bias, head = tensors = [draw(2, 3, 3, 3), draw(2), draw(2), draw(8, 3)]

    def loss_of(x: Tensor, part: Part) -> Tensor:
        hidden = F.conv2d(x, kernel)
        if ranks.count == 1:
            normal = F.batch_norm(hidden, None, None, scale, bias, training=True, eps=1e-5)
        else:
            normal = batch_norm_over(part, 1e-5, hidden, scale, bias, bias, scale)
        logits = normal.sigmoid().flatten(1) @ head
        whole = divergence(part.join(logits), part.join(x.flatten(1) @ teacher), 2.0)
        return whole + likeness_loss(part.join(normal), part.join(x)) + part.mean(logits.square().mean())

    with Silent().task("", 1) as task:
        train(images, [Group(tensors, 0.01)], loss_of, HOW, generator, task, ranks=ranks)
    return tensors


def main() -> None:
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        assert ranks.count == 3
        found, first = trained(ranks), ranks.lead(lambda: trained(ALONE))
        torch.testing.assert_close(found, first, rtol=0, atol=1e-9)
        assert all(torch.equal(mine, others) for mine, others in zip(found, ranks.share(found), strict=True))

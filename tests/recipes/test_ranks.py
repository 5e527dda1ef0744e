"""How processes share out a batch, and that they come to what one comes to."""

from __future__ import annotations

import pytest
import torch

from recipes.ranks import ALONE, Part, Ranks
from tests.mixmix_cli.command import together
from tests.recipes import three_ranks


@pytest.mark.parametrize(("count", "whole"), [(1, 5), (2, 5), (3, 2), (4, 8), (7, 3)])
def test_parts_make_up_the_batch(count: int, whole: int) -> None:
    parts = [Part.of(Ranks(rank, count), whole) for rank in range(count)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(whole))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(part.take(torch.zeros(whole, 3))) == max(1, size) for part, size in zip(parts, sizes, strict=True))


def test_alone_nothing_is_done() -> None:
    x = torch.rand(5, 3)
    part = Part.of(ALONE, 5)
    assert torch.equal(part.take(x), x)
    assert part.join(x) is x
    assert part.mean(x) is x
    assert not torch.distributed.is_initialized()


def test_three_processes_train_as_one() -> None:
    """Uneven batches, one process without an image, statistics and losses of the whole batch, the same bits in all."""
    together(3, work=three_ranks.main)

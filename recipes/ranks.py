"""Several processes on one job: what `torchrun` starts, and how they agree.

Work that falls into independent parts is dealt out; only plain objects (which parts, what came out) travel between
processes, so gloo serves all devices. A process that nobody started with torchrun is a team of one.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=30)
"""How long one process waits for another: as long as the longest share of the work may take."""


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` among `count`; rank 0 leads: it alone writes what belongs to all, and talks."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: T) -> T:
        """What the leader passes in, in every process; all of them wait here for one another."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def deal(self, parts: Sequence[T]) -> list[T]:
        """This process's parts: every `count`-th."""
        return list(parts[self.rank :: self.count])


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The team that torchrun started this process in, or a team of one."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine, which is that of the GPU it should take."""
    return int(os.environ.get("LOCAL_RANK", "0"))

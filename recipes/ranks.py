"""Several processes on one job: what `torchrun` starts, and how they agree.

Work that falls into independent parts is dealt out. Training is data-parallel: every process draws the same batch,
computes with its `Part` of it, and takes the same step, along the mean of all gradients. A process that nobody started
with torchrun is a team of one, for which nothing here does anything.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=30)
"""How long one process waits for another: as long as the longest share of the work may take."""
COURTESY = datetime.timedelta(seconds=30)
"""How long a process that fails waits for the first one to say why."""
SAID = "mixmix/said"
"""Key in torchrun's store: somebody has said why the run fails."""


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
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]  # the leader's

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` comes to, in every process; the leader alone does it."""
        return self.share(work() if self.leads else None)  # type: ignore[return-value]  # the leader's

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def deal(self, parts: Sequence[T]) -> list[T]:
        """This process's parts: every `count`-th."""
        return list(parts[self.rank :: self.count])

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors`, of any shapes on one device, the leader's values, in place."""
        if self.count > 1:
            flat = _flattened(tensors)
            dist.broadcast(flat, src=0)
            _put_back(flat, tensors)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors`, of any shapes on one device, the means of all processes' values, in place."""
        if self.count > 1:
            flat = _flattened(tensors)
            dist.all_reduce(flat)
            _put_back(flat / self.count, tensors)


ALONE = Ranks()


def _flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in a row [n], as one message is faster than many."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def _put_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))


class _Total(torch.autograd.Function):
    """The sum over all processes, in each of them.

    Its gradient is that of the sum of their losses, which `Ranks.average` makes that of one loss. The function of
    `torch.distributed.nn` that does the same is deprecated, and has no successor in all versions of torch that we take.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _total(gradient)


def _total(x: Tensor) -> Tensor:
    total: Tensor = _Total.apply(x)
    return total


@dataclass(frozen=True)
class Part:
    """This process's images of a batch of `whole`: those from `start` to `stop`, which may be none."""

    ranks: Ranks
    start: int
    stop: int
    whole: int

    @classmethod
    def of(cls, ranks: Ranks, whole: int) -> Part:
        """As many as any other process has, or one fewer."""
        start, stop = (rank * whole // ranks.count for rank in (ranks.rank, ranks.rank + 1))
        return cls(ranks, start, stop, whole)

    def take(self, batch: Tensor) -> Tensor:
        """Its rows of a batch [N, ...]; where it has none, a row that counts for nothing, as networks need one."""
        return batch[self.start : self.stop] if self.stop > self.start else batch[:1]

    def join(self, rows: Tensor) -> Tensor:
        """The rows [N, ...] of the whole batch from those that each process has computed, with their gradient."""
        if self.ranks.count == 1:
            return rows
        mine = rows[: self.stop - self.start]
        before, after = (rows.new_zeros(count, *rows.shape[1:]) for count in (self.start, self.whole - self.stop))
        return _total(torch.cat([before, mine, after]))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the images of the whole batch from each process's mean over its own, with its gradient."""
        if self.ranks.count == 1:
            return value
        return _total(value * ((self.stop - self.start) / self.whole))


@contextmanager
def join_ranks(device: str = "cpu") -> Iterator[Ranks]:
    """The team that torchrun started this process in, or a team of one.

    `device` is what the user calls the device of the tensors that travel (`devices.choose_device`).
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield ALONE
        return
    import torch.distributed.nn  # noqa: F401  # else it is imported later, and holds the group and its threads to the end

    store, rank, count = _rendezvous()
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=count, timeout=PATIENCE)
    yield Ranks(rank, count)
    dist.destroy_process_group()  # not when this process fails: what others then said would not be the reason


def _backend(device: str) -> str:
    """NCCL for tensors on GPUs where every process has one of its own, as it takes no other; gloo for all else."""
    own = device == "auto" and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    return "cpu:gloo,cuda:nccl" if own and dist.is_nccl_available() else "gloo"


@cache
def _rendezvous() -> tuple[Store, int, int]:
    """Torchrun's store, this process's rank, and how many there are."""
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    store, rank, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    return store, rank, count


def say_once(say: Callable[[], None]) -> None:
    """Call `say`, which tells why this process fails, in one of the processes that torchrun started.

    In the first one, unless that has not failed by `COURTESY`: the others wait for it, as torchrun ends all processes
    when it sees that one has ended.
    """
    store, rank, _ = _rendezvous()
    with suppress(dist.DistError):  # the first one goes on
        if rank > 0:
            store.wait([SAID], COURTESY)
        if store.check([SAID]):
            return
    say()
    with suppress(dist.DistError):
        store.set(SAID, "")


def local_rank() -> int:
    """This process's number on its machine, which is that of the GPU it should take."""
    return int(os.environ.get("LOCAL_RANK", "0"))

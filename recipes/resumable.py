"""A walk through the blocks that goes on where an interrupted one was: what quantizing and pruning have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from recipes.checkpoint import Checkpoint, State, Table, gather, scatter
from recipes.progress import Progress
from recipes.reconstruct import Reconstruction, Stretch

GENERATOR = "generator"


class Walk:
    """Blocks done, the account of them, and the tables of changes that they have come to, kept in a checkpoint.

    All chance comes from `generator`. `complete` adds entries to the tables that a state has and they do not yet.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tables: Mapping[str, Table],
        generator: torch.Generator,
        complete: Callable[[State], None] = lambda state: None,
    ) -> None:
        self.checkpoint, self.tables, self.generator, self._complete = checkpoint, tables, generator, complete
        self.account: list[tuple[str, Reconstruction]] = []
        self._done = 0
        self._last: State | None = None
        """After the last block that was done; None where that is on disk, or no block is done."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write what is done where the block within is left by an exception, such as an interruption."""
        try:
            yield
        except BaseException:
            if self._last is not None:
                self.checkpoint.write(self._last)
            raise

    def resume(self, progress: Progress) -> State | None:
        """Take up what an interrupted run has left, which is returned."""
        found = self.checkpoint.find()
        if found is None:
            return None
        self.restore(found)
        progress.say(f"going on after block {self._done}, as what was done before is kept")
        return found

    def restore(self, found: State) -> None:
        """Take up what another run, or another process, has come to."""
        self._complete(found)
        scatter(found, self.tables)
        self.generator.set_state(found.tensors[GENERATOR])
        self.account = [(name, Reconstruction(before, after)) for name, before, after in found.numbers["account"]]
        self._done = int(found.numbers["blocks"])

    def through(self, stretches: Iterable[Stretch], passed: Callable[[Stretch], None]) -> Iterator[Stretch]:
        """The stretches that are not done yet; `passed` is told the others."""
        for index, stretch in enumerate(stretches):
            if index < self._done:
                passed(stretch)
                continue
            yield stretch
            self._done = index + 1
            self._last = None if self.checkpoint.offer(self.state) else self._copy()

    def _copy(self) -> State:
        """The state in tensors of its own, as blocks to come train theirs in place."""
        state = self.state()
        return State({name: tensor.clone() for name, tensor in state.tensors.items()}, state.numbers)

    def state(self) -> State:
        """Everything that the blocks done so far have come to."""
        account = [(name, error.before, error.after) for name, error in self.account]
        tensors = gather(self.tables) | {GENERATOR: self.generator.get_state()}
        return State(tensors, {"blocks": self._done, "account": account})

"""How long work reports itself, whoever shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """`steps` more of the total are done; `note` is a short live figure, such as the current loss."""


class Progress(Protocol):
    """Where work reports to."""

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        """Announce work of `total` steps; the task lives as long as the context. Tasks may lie within one another."""
        ...

    def say(self, message: str) -> None:
        """One line that the user should read."""


class Silent:
    """Reports to nobody."""

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        pass

    def say(self, message: str) -> None:
        pass

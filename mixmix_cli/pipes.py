"""Output that nobody reads any more, as in `mixmix ... | head -1`: the work goes on, and so does its exit status."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


def hush(stream: IO[str]) -> None:
    """Let what is still written to the stream, or waits in it, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def while_read(stream: IO[str]) -> Iterator[None]:
    """Hush the stream where it turns out, in the `with` block, that nobody reads it."""
    try:
        yield
    except BrokenPipeError:
        hush(stream)

"""The command line as a function and as processes, and words that make commands quick."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from mixmix_cli import __main__
from mixmix_cli.__main__ import main

TINY = ("--set", 'stages=[{"scale":0.5,"steps":4},{"scale":1.0,"steps":4}]', "--batch", "8")
FEW = ("--set", "steps=6")
BRIEFLY = ("--set", "mask_steps=2", "--set", "steps=2", "--set", "sensitive_images=4")
"""Pruned so."""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one call."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def start(*arguments: object, alone: bool = False) -> subprocess.Popen[str]:
    """A Python process with these arguments, on one thread, that can be interrupted; `alone` in a group of its own.

    What a shell starts in the background ignores interrupts, and so do its children, if nobody says otherwise.
    """
    command = [sys.executable, *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler is SIG_DFL in a new process
    try:
        return subprocess.Popen(command, text=True, env=environment, start_new_session=alone, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """What it has printed, stdout and stderr."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == status, err
    return out, err


@cache
def _forks() -> ForkServerContext:
    """Processes that find imported what takes Python seconds."""
    context = multiprocessing.get_context("forkserver")
    engines = [f"recipes.{name}.engine" for name in ("synth", "quantize", "distill")]
    context.set_forkserver_preload(["mixmix_cli.__main__", "torch.distributed.nn", "recipes.pipeline", *engines])
    return context


def _work(
    work: Callable[[], object], arguments: list[str], environment: dict[str, str], folder: Path, printed: list[Path]
) -> None:
    """What a process does that has been told nothing yet of where it is, and what is asked of it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    sys.argv = ["mixmix", *arguments]
    work()


class Forked:
    """`mixmix` with these arguments, or other work, on one thread in a process of its own that ends with this one."""

    def __init__(
        self, *arguments: object, work: Callable[[], object] = __main__.run, environment: dict[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._printed = [Path(self._folder.name) / name for name in ("out", "err")]
        for path in self._printed:
            path.touch()
        given = (work, [str(argument) for argument in arguments], dict(os.environ) | (environment or {}), Path.cwd())
        self._process = _forks().Process(target=_work, args=(*given, self._printed), daemon=True)
        self._process.start()

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def send(self, how: signal.Signals) -> None:
        """Send a signal to it while it runs."""
        assert self._process.pid
        assert self.status is None, self.printed()
        os.kill(self._process.pid, how)

    def printed(self) -> tuple[str, str]:
        """What it has printed, stdout and stderr."""
        out, err = (path.read_text() for path in self._printed)
        return out, err

    def wait(self, seconds: float) -> None:
        """Until it has ended; what has not by then is ended."""
        self._process.join(seconds)
        if self.status is None:
            self._process.kill()
            self._process.join()


def together(
    count: int, *arguments: object, status: int = 0, work: Callable[[], object] = __main__.run
) -> tuple[str, str]:
    """What `count` processes print that are told what torchrun tells its own; all end with this status."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    job |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"}
    started = [
        Forked(*arguments, work=work, environment=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    deadline = time.monotonic() + 120
    for process in started:
        process.wait(max(1.0, deadline - time.monotonic()))
    out, err = ("".join(texts) for texts in zip(*(process.printed() for process in started), strict=True))
    assert [process.status for process in started] == [status] * count, err
    return out, err


def torchrun(count: int) -> tuple[str, ...]:
    """Arguments that start what follows in `count` processes."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))

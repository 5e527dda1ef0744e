"""The command line as a function and as processes, and words that make commands quick."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

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


def _work(work: Callable[[], object], arguments: list[str], environment: Mapping[str, str], output: Path) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["mixmix", *arguments]
    work()


class Forked:
    """`mixmix` with these arguments, or other work, in a process of its own; for those who call it like a Popen."""

    def __init__(
        self,
        *arguments: object,
        work: Callable[[], object] = __main__.run,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "printed"
        words, environment = [str(argument) for argument in arguments], {"OMP_NUM_THREADS": "1"} | (environment or {})
        self._process = _forks().Process(target=_work, args=(work, words, environment, self._output))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, how: signal.Signals) -> None:
        os.kill(self._process.pid or 0, how)

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        assert self.returncode is not None, "it has not ended"
        out, err = (self._output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return out, err


def together(count: int, *arguments: object, work: Callable[[], object] = __main__.run) -> tuple[str, str]:
    """What `count` processes print that are told what torchrun tells its own, stdout and stderr; all end with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
    job |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = [
        Forked(*arguments, work=work, environment=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    printed = [process.communicate(timeout=200) for process in started]
    out, err = ("".join(texts) for texts in zip(*printed, strict=True))
    assert [process.returncode for process in started] == [0] * count, err
    return out, err


def torchrun(count: int) -> tuple[str, ...]:
    """Arguments that start what follows in `count` processes."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))

"""The command line as a function and as processes, and words that make commands quick."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

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


def torchrun(count: int) -> tuple[str, ...]:
    """Arguments that start what follows in `count` processes."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))

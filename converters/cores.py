"""How many cores this process may use, which onnxruntime does not ask: it counts those of the machine.

More threads than can run at once wait for one another, and a model takes several times as long, never the same twice.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""`MICROSECONDS PERIOD` of processor time, or `max PERIOD`: what containers are limited by."""
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
"""Processors that are one core."""


def allowed_cores() -> int:
    """How many cores the process may use, where something limits it; 0 where nothing does, or nothing is known."""
    limits = [limit for limit in (_by_affinity(), _by_quota()) if limit]
    return min(limits, default=0)


def _by_affinity() -> int:
    """Cores of the processors that the scheduler may choose from; 0 where those are all."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    processors = os.sched_getaffinity(0)
    if len(processors) >= (os.cpu_count() or 1):
        return 0
    return len({_core_of(processor) for processor in processors})


def _core_of(processor: int) -> str:
    try:
        return Path(SIBLINGS.format(processor)).read_text().strip()
    except OSError:
        return str(processor)


def _by_quota() -> int:
    """Processors' worth of time that a container gives, rounded up; 0 where it gives all."""
    try:
        quota, period = QUOTA.read_text().split()
        return 0 if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return 0

"""How many threads onnxruntime gets, by what limits the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from converters import cores
from converters.runtime import _options


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two processors each, all of them given."""
    for processor in range(8):
        (tmp_path / f"cpu{processor}").write_text(f"{processor % 4},{processor % 4 + 4}\n")
    monkeypatch.setattr(cores, "SIBLINGS", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    allow(monkeypatch, *range(8))
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, *processors: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(processors), raising=False)


def test_nothing_is_limited(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores.allowed_cores() == 0
    (machine / "cpu.max").write_text("max 100000\n")
    assert cores.allowed_cores() == 0
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.allowed_cores() == 0


@pytest.mark.parametrize(("processors", "count"), [((0,), 1), ((0, 4), 1), ((0, 1), 2), ((0, 1, 2, 3, 4, 5, 6), 4)])
def test_processors_that_are_one_core_count_once(
    processors: tuple[int, ...], count: int, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, *processors)
    assert cores.allowed_cores() == count
    assert _options(optimise=True, threads=0).intra_op_num_threads == count
    assert _options(optimise=True, threads=3).intra_op_num_threads == 3
    monkeypatch.setattr(cores, "SIBLINGS", str(machine / "nowhere{}"))
    assert cores.allowed_cores() == len(processors)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("max 100000", 0), ("", 0), ("1 0 1", 0)],
)
def test_a_container_gives_less(quota: str, count: int, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "cpu.max").write_text(quota)
    assert cores.allowed_cores() == count
    allow(monkeypatch, 0)
    assert cores.allowed_cores() == 1

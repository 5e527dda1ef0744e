"""Engines whose tensors are not in the processor's memory: they come to the same, and do not wait at every step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BY_OTHER_SUMS = 1e-4
"""Largest difference relative to the whole: sums may be taken in another order elsewhere."""

MOST_OPERATIONS = {"synth small": 205, "synth small-labels": 340}
"""A step, of 6 layers with BatchNorm and of 20 folded ones: what starting them costs decides how fast a GPU is.
They took 347 and 1,374 while means and deviations were compared layer by layer."""

LOOKS = ("recipes/synth/engine.py", "recipes/training.py")
"""Where a loss is read now and then, for people and to see whether it still falls."""


def test_every_engine_runs_elsewhere_and_waits_for_no_step(tmp_path: Path) -> None:
    """In a process of its own: torch starts its threads for devices at the first backward pass."""
    command = [sys.executable, "-m", "tests.recipes.runs_elsewhere", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {
        "synth small", "synth paper", "synth small-labels", "compare", "quantize", "quantize qat", "prune",
        "prune channels", "distill",
    }  # fmt: skip
    assert {name: run for name, run in found.items() if not run["difference"] <= BY_OTHER_SUMS} == {}
    for name, most in MOST_OPERATIONS.items():
        assert found[name]["operations"] <= most
    for name, run in found.items():
        for line, count in run.get("waits", {}).items():
            assert any(look in line for look in LOOKS), f"{name} waits in each step at {line}"
            assert count <= 1, f"{name} waits {count} times in four steps at {line}"


def test_what_a_gpu_refuses_is_refused_elsewhere() -> None:
    code = """
import torch
from tests.elsewhere import ELSEWHERE, Watch
there, here = torch.ones(3, device=ELSEWHERE), torch.ones(3)
for attempt in (lambda: there + here, lambda: there.numpy(), lambda: torch.where(there > 0, here, here),
                lambda: torch.rand(3, device=ELSEWHERE, generator=torch.Generator())):
    try:
        attempt()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("it was done")
assert (there + here[0]).device == there.add_(1).device == ELSEWHERE
three = torch.tensor([3], device=ELSEWHERE)
watch = Watch()
with watch.kept():
    here.to(ELSEWHERE, non_blocking=True)
    assert not watch.waits
    for wait in (lambda: here.to(ELSEWHERE), lambda: there.cpu(), lambda: float(there.sum()),
                 lambda: there[torch.tensor([0])], lambda: there[there > 5], lambda: there.unique(),
                 lambda: torch.segment_reduce(there, "sum", lengths=three)):
        before = watch.waits.total()
        wait()
        assert watch.waits.total() == before + 1, wait
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr

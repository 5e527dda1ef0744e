"""Other tools' virtual environments, made in a benchmark's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def interpreter(name: str, packages: Sequence[str], folder: Path) -> str:
    """The Python that has the packages, installed where it is not yet; this one where there are none to install.

    Raises RuntimeError with pip's reason where they cannot be installed.
    """
    if not packages:
        return sys.executable
    home, done = folder / "env" / name, folder / "env" / f"{name}.json"
    python = home / "bin" / "python"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        pip = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        done.write_text(json.dumps({"error": last_line(pip.stderr) if pip.returncode else None}))
    error = json.loads(done.read_text())["error"]
    if error:
        raise RuntimeError(f"cannot be installed: {error}")
    return str(python)


def last_line(text: str) -> str:
    """What a process said last, in at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"

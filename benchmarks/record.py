"""What the benchmarks have in common: what a figure was measured on, figures kept as they come, which rows to do."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")
UNITS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "amx_bf16": "AMX"}
"""What a processor may have that decides how fast, or how exact, a figure is; by the names Linux has for them."""


def machine(*packages: str) -> str:
    """Processor with what it computes with, cores of those there are, torch's threads as they are now, and versions."""
    fields = _processor()
    flags = fields.get("flags", "").split()
    units = list(dict.fromkeys(name for flag, name in UNITS.items() if flag in flags))
    name = fields.get("model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{usable} of {os.cpu_count()} cores"
    if "torch" in sys.modules:
        cores += f", {sys.modules['torch'].get_num_threads()} threads"
    versions = [f"{package} {_version(package)}" for package in ("torch", "onnxruntime", *packages)]
    return ", ".join([name + (f" ({', '.join(units)})" if units else ""), cores, *versions])


def _processor() -> dict[str, str]:
    """What Linux tells of the first core; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _version(package: str) -> str:
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def commit() -> str:
    """The commit that runs, with a plus sign where files have been changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def chosen_rows(rows: Mapping[str, Row], only: str) -> dict[str, Row]:
    """The row that has this title or, where none has, all that have it in theirs; exits where none has."""
    chosen = {title: row for title, row in rows.items() if title == only or (only not in rows and only in title)}
    if not chosen:
        sys.exit(f"no row has {only!r} in its title; there are: {'; '.join(rows)}")
    return chosen


class Results:
    """Figures by key, one JSON line each, with the commit and the machine that they are from.

    What is in the file when it is opened is not measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.provenance = {"commit": commit(), "machine": machine()}
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.found = {tuple(row["key"]): row["value"] for row in rows}
        older = sum(any(row.get(key) != value for key, value in self.provenance.items()) for row in rows)
        if older:
            print(f"{older} of the {len(rows)} figures in {path} are of another commit or machine", file=sys.stderr)

    def get(self, key: tuple[object, ...], measure: Callable[[], list[float]]) -> list[float]:
        if key not in self.found:
            self.found[key] = measure()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self.found[key], **self.provenance}) + "\n")
        return self.found[key]

"""onnxruntime, the judge: every accuracy, and every check of a conversion, comes from here."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from converters.errors import ModelError

Array = NDArray[np.generic]
SILENT = 4  # onnxruntime's log level that leaves only what ends the process; errors come as exceptions


def installation_conflict() -> str | None:
    """A sentence when onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files."""
    both = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.distribution(name)
            both.append(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    if len(both) < 2:
        return None
    return "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall both, reinstall one"


class Session:
    """One model in onnxruntime on the CPU.

    `optimise=False` turns every graph optimisation off: the plain meaning of the file, against which the fused result
    is held. `threads` is the number of intra-operator threads (0: all cores).
    """

    def __init__(self, model: Path | bytes, *, optimise: bool = True, threads: int = 0, name: str = "") -> None:
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = SILENT
        self.name = name or (str(model) if isinstance(model, Path) else "model")
        try:
            self._session = onnxruntime.InferenceSession(
                str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exception classes are not part of its public API
            raise ModelError(f"{self.name}: onnxruntime cannot load the model ({_first_line(error)})") from error
        self.input_name: str = self._session.get_inputs()[0].name
        self.output_names: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Array, outputs: Sequence[str] | None = None) -> list[Array]:
        """Outputs (all, or those named) for one batch. Raises ModelError when onnxruntime refuses the batch."""
        try:
            quiet = onnxruntime.RunOptions()
            quiet.log_severity_level = SILENT
            return self._session.run(list(outputs) if outputs else None, {self.input_name: inputs}, quiet)
        except Exception as error:  # as above
            raise ModelError(f"{self.name}: onnxruntime cannot run the model ({_first_line(error)})") from error

    def latency(self, inputs: Array, *, seconds: float = 0.5, least: int = 5) -> float:
        """Median time of one run on `inputs` in milliseconds, over at least `least` runs after one warm-up."""
        self.run(inputs)
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < least or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            self.run(inputs)
            times.append(time.perf_counter() - before)
        return float(np.median(times) * 1e3)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""onnxruntime, the judge: every accuracy, and every check of a conversion, comes from here."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from converters.cores import allowed_cores
from converters.errors import ModelError

Array = NDArray[np.generic]
INPUT_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
PROTOBUF_LIMIT = (1 << 31) - (1 << 20)  # bytes of a serialised model, with some room
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
    is held. `threads` is the number of intra-operator threads (0: all cores that the process may run on). `first` names
    the output to give first. `rests` lets the threads sleep between two runs, for a session that is not the only one.
    """

    def __init__(
        self,
        model: Path | bytes | ir.Model,
        *,
        optimise: bool = True,
        threads: int = 0,
        name: str = "",
        first: str | None = None,
        rests: bool = False,
    ) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "model")
        with tempfile.TemporaryDirectory() as folder:
            content = _for_runtime(model, Path(folder))
            options = _options(optimise=optimise, threads=threads)
            if rests:
                options.add_session_config_entry("session.force_spinning_stop", "1")
            self._session = _load(content, options, self.name)
        image = self._session.get_inputs()[0]
        self.input_name: str = image.name
        self._type = INPUT_TYPES.get(image.type)
        names = [output.name for output in self._session.get_outputs()]
        self.output_names: list[str] = sorted(names, key=lambda output: output != first) if first else names

    def run(
        self, inputs: Array, outputs: Sequence[str] | None = None, more: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """Outputs (all, or those named) for one batch, which is brought to the input's type; `more` are other inputs.

        Raises ModelError when onnxruntime refuses the batch.
        """
        try:
            quiet = onnxruntime.RunOptions()
            quiet.log_severity_level = SILENT
            given = {self.input_name: self._typed(inputs), **(more or {})}
            return self._session.run(list(outputs or self.output_names), given, quiet)
        except Exception as error:  # as above
            raise ModelError(f"{self.name}: onnxruntime cannot run the model ({_first_line(error)})") from error

    def run_in_batches(self, inputs: Array, batch: int) -> Array:
        """The first output for any number of inputs [N, ...], `batch` at a time; the last batch is filled up."""
        parts = []
        for start in range(0, len(inputs), batch):
            part = inputs[start : start + batch]
            parts.append(self.run(fill(part, batch))[0][: len(part)])
        return np.concatenate(parts)

    def _typed(self, inputs: Array) -> Array:
        if self._type is None or inputs.dtype == self._type:
            return inputs
        if self._type is np.uint8:
            inputs = inputs.round().clip(0, 255)
        return inputs.astype(self._type)

    def latency(self, inputs: Array, *, seconds: float = 0.5, least: int = 5, enough: int = 200) -> float:
        """Median time of one run on `inputs` in milliseconds, after one warm-up.

        Over as many runs as go into `seconds`, `least` of them at least; into a fifth of that where those are `enough`.
        """
        self.run(inputs)
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < least or time.perf_counter() - started < (seconds if len(times) < enough else seconds / 5):
            before = time.perf_counter()
            self.run(inputs)
            times.append(time.perf_counter() - before)
        return float(np.median(times) * 1e3)


def fill(inputs: Array, batch: int) -> Array:
    """A whole batch of inputs [n, ...], n of 1 to `batch`: the last one is repeated."""
    return np.concatenate([inputs, np.repeat(inputs[-1:], batch - len(inputs), 0)]) if len(inputs) < batch else inputs


def time_in_turn(sessions: Sequence[Session], inputs: Array, *, seconds: float = 1.0, least: int = 5) -> list[float]:
    """Milliseconds of the fastest run of each session on `inputs`: what else the machine does only adds to them.

    They run in turn, `least` times each at least, and as often as goes into `seconds` for all.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(inputs)
    started = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - started < seconds:
        for session, found in zip(sessions, times, strict=True):
            before = time.perf_counter()
            session.run(inputs)
            found.append(time.perf_counter() - before)
    return [min(found) * 1e3 for found in times]


def _options(*, optimise: bool, threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or allowed_cores()
    options.log_severity_level = SILENT
    return options


def _load(content: str | bytes, options: onnxruntime.SessionOptions, name: str) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes are not part of its public API
        raise ModelError(f"{name}: onnxruntime cannot load the model ({_first_line(error)})") from error


def optimised_operators(path: Path) -> list[str]:
    """The operator of every node that onnxruntime runs on this machine's CPU, after all optimisations.

    Raises ModelError when it cannot load the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimised.onnx"
        options = _options(optimise=True, threads=1)
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        _load(str(path), options, str(path))
        return [node.op_type for node in onnx.load(written, load_external_data=False).graph.node]


def fits_protobuf(model: ir.Model) -> bool:
    """Whether the model can be one file; protobuf ends at 2 GB."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) < PROTOBUF_LIMIT


def serialise(model: ir.Model) -> bytes:
    """The bytes of one file, less what onnx-ir says of initializers again that their tensors say."""
    proto = ir.to_proto(model)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    told = [info for info in proto.graph.value_info if info.name not in initializers or info.metadata_props]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(told)
    return bytes(proto.SerializeToString())


def _for_runtime(model: Path | bytes | ir.Model, folder: Path) -> str | bytes:
    """What onnxruntime reads: a path or bytes; a graph too large for bytes goes to `folder` first."""
    if isinstance(model, Path):
        return str(model)
    if isinstance(model, bytes):
        return model
    if fits_protobuf(model):
        return serialise(model)
    ir.save(model, folder / "model.onnx", external_data="model.data")
    return str(folder / "model.onnx")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""What a long run has computed so far, on disk beside its output, so that one that was interrupted is gone on with.

One safetensors file, `OUTPUT.KIND-MARK.partial`, is replaced as a whole every few seconds of work and removed at the
end. The mark is of what was asked for: models, images, settings, seed and versions; another run has another file.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from converters.errors import OutputError
from converters.outputs import write_atomically
from converters.torch_module import TorchClassifier
from recipes.images import ImageSet

T = TypeVar("T")
MEASURED, SUFFIX = "measured", ".partial"
SECONDS = 20.0
"""Work between two writes, or so many times what the last one took; a run that goes by blocks writes at the end of
one."""


@dataclass(frozen=True)
class State:
    """Tensors and numbers (JSON) from which the rest of a run follows."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    def cpu(self) -> State:
        """The same, where another process can take it over."""
        return State({name: tensor.cpu() for name, tensor in self.tensors.items()}, self.numbers)


class Stateful(Protocol):
    """What a run changes, which can be put down and taken up again."""

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


Table = Mapping[str, Stateful]


def gather(tables: Mapping[str, Table]) -> dict[str, Tensor]:
    """The states of all entries of named tables, by `table|key|entry`."""
    return {
        f"{title}|{key}|{name}": tensor
        for title, table in tables.items()
        for name, entry in table.items()
        for key, tensor in entry.state().items()
    }


def scatter(state: State, tables: Mapping[str, Table]) -> None:
    """Put back what `gather` gave, into entries that are there already."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for path, tensor in state.tensors.items():
        title, _, rest = path.partition("|")
        key, _, name = rest.partition("|")
        found.setdefault((title, name), {})[key] = tensor
    for title, table in tables.items():
        for name, entry in table.items():
            if (title, name) in found:
                entry.restore(found[title, name])


class Checkpoint:
    """The file beside `output`, for a run of a `kind` on `module` and `images` that `facts` tell from all others."""

    def __init__(
        self,
        output: Path,
        kind: str,
        modules: Iterable[TorchClassifier],
        images: ImageSet,
        facts: Mapping[str, object],
        say: Callable[[str], None] = lambda message: None,
        seconds: float | None = None,
    ) -> None:
        self._say, self._written, self._took = say, time.monotonic(), 0.0
        self.seconds = SECONDS if seconds is None else seconds
        modules = list(modules)
        sources = [(module.classifier.sha256, module.spec.model_dump(mode="json")) for module in modules]
        mark = hashlib.sha256(json.dumps([facts, sources, _versions()], sort_keys=True, default=str).encode())
        mark.update(images.pixels.contiguous().numpy().data)
        for module in modules:
            for step in module.whole.steps:
                mark.update(repr((step.op, step.inputs, step.outputs)).encode())
            for buffer in module.buffers():
                mark.update(buffer.cpu().contiguous().numpy().data)
        self.path = output.with_name(f"{output.name}.{kind}-{mark.hexdigest()[:8]}{SUFFIX}")
        self._mark = mark.hexdigest()
        self._measured: dict[str, Any] = {}

    def measured(self, name: str, measure: Callable[[], T]) -> T:
        """What `measure` gives (JSON), or gave an interrupted run of just this kind: measured once, in every state."""
        found = self._read()
        known = {} if found is None else found.numbers.get(MEASURED, {})
        value: T = known[name] if name in known else measure()
        self._measured = {**known, name: value}
        if name not in known:
            self.write(found or State({}, {}))
        return value

    def find(self) -> State | None:
        """What an interrupted run of just this kind has left; None where there is nothing of use."""
        found = self._read()
        if found is None or not found.tensors:
            return None
        return State(found.tensors, {name: number for name, number in found.numbers.items() if name != MEASURED})

    def _read(self) -> State | None:
        try:
            with safetensors.safe_open(str(self.path), "pt") as file:
                said = file.metadata() or {}
                if said.get("run") != self._mark:
                    return None
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
                return State(tensors, json.loads(said["numbers"]))
        except (OSError, safetensors.SafetensorError):
            return None

    def offer(self, state: Callable[[], State]) -> bool:
        """Write `state()` if it is time to, and whether it was."""
        due = time.monotonic() - self._written >= self.seconds * max(1.0, self._took)
        if due:
            self.write(state())
        return due

    def write(self, now: State) -> None:
        """Write a state; where that is not possible, the run goes on without."""
        started = time.monotonic()
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in now.tensors.items()}
        said = {"run": self._mark, "numbers": json.dumps({**now.numbers, MEASURED: self._measured})}
        try:
            write_atomically(self.path, safetensors.torch.save(tensors, said))
        except OutputError as error:
            self.seconds = math.inf
            self._say(f"an interruption would lose this run, as its state cannot be kept: {error}")
        self._written = time.monotonic()
        self._took = self._written - started

    def remove(self) -> None:
        """The run is done."""
        self.path.unlink(missing_ok=True)


def states_of(output: Path) -> list[Path]:
    """What interrupted runs, of whatever kind, have left to go on from to `output`."""
    return list(output.parent.glob(f"{glob.escape(output.name)}.*{SUFFIX}"))


def left_beside(output: Path) -> bool:
    """Whether interrupted runs have left something to go on from to `output`."""
    return bool(states_of(output))


def _versions() -> list[str]:
    try:
        own = importlib.metadata.version("mixmix")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = ""
    return [own, torch.__version__]

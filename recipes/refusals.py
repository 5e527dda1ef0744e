"""What can be refused without torch, whose import takes seconds: the face asks before it loads anything else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from converters.errors import MixMixError, OutputError
from converters.outputs import ensure_makeable, ensure_model, ensure_writable

MANIFEST = "manifest.json"
"""In a folder that synth writes: what it was made of."""
RECORDS = "shards"
"""There: what is finished."""


class DataError(MixMixError):
    """An image set that is missing, empty or malformed."""


class GateError(MixMixError):
    """A gate that cannot be decided on these images."""


def check_source(path: Path) -> None:
    """Raise DataError where no image set can be."""
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder of images, a folder that synth wrote, or an .npz file")
    if path.is_file() and path.suffix != ".npz":
        raise DataError(f"{path} is neither a folder nor an .npz file: give one of these")


def check_compression(
    models: Iterable[Path], output: Path | None, data: Path | None, max_drop: float | None, *, overwrite: bool
) -> None:
    """Raise MixMixError where a model is missing, none can be written to `output`, or the gate cannot be decided."""
    given = list(models)
    for path in given:
        ensure_model(path)
    if output is not None:
        ensure_writable(output, overwrite=overwrite, inputs=[*given, *([data] if data else [])])
    if data is None and max_drop is not None:
        raise GateError("--max-drop needs real labels: give labelled images with --data")


def is_set(directory: Path) -> bool:
    """Whether synth wrote what is in the folder: other programs have manifests too, and its own may be damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (directory / MANIFEST).is_file() and (directory / RECORDS).is_dir()
    return isinstance(manifest, dict) and manifest.keys() >= {"format", "identity"}


def check_set_folder(directory: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError where no image set can be written."""
    if not directory.is_dir() and (directory.exists() or directory.suffix == ".npz"):
        raise OutputError(
            f"{directory} is not a folder, which images are written to: name one, and make an .npz of what is in it"
            " with mixmix data export"
        )
    if directory.is_dir() and any(directory.iterdir()) and not is_set(directory):
        raise OutputError(f"{directory} is not empty, and not a set that synth wrote: choose another folder with -o")
    if not (resume or overwrite):
        check_empty(directory, "pass --resume to go on, or --force to replace it")


def check_empty(directory: Path, advice: str = "choose another with -o, or pass --force to replace it") -> None:
    """Raise OutputError where a folder holds something already, or cannot be made."""
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{directory} is not a folder: choose another with -o")
    if directory.exists() and any(directory.iterdir()):
        raise OutputError(f"{directory} is not empty: {advice}")
    ensure_makeable(directory)

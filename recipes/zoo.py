"""Model zoos: the embedded one, and the paper's, whose models installed libraries have. Imports nothing heavy.

The embedded zoo: small Fashion-MNIST classifiers of six families, and labelled images to judge by, trained and exported
by `benchmarks/train_zoo.py`. Fashion-MNIST is (c) 2017 Zalando SE, MIT licence.
"""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from converters.errors import MixMixError, OutputError, nearest
from converters.outputs import ensure_writable, write_atomically

EMBEDDED = Path(str(resources.files("recipes"))) / "embedded"
FAMILIES = ("plain", "residual", "inverted", "shuffle", "dense", "excite")
WITHOUT_BATCHNORM = ("attention", "inverted_folded")


def model_path(name: str) -> Path:
    """The ONNX file of one family (BatchNorm kept), or of one `WITHOUT_BATCHNORM`."""
    return EMBEDDED / f"{name}.onnx"


def test_images_path() -> Path:
    """1,000 labelled test images: only to judge by."""
    return EMBEDDED / "test.npz"


def calibration_images_path() -> Path:
    """256 labelled training images: the bound that real data set."""
    return EMBEDDED / "calibration.npz"


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@dataclass(frozen=True)
class Member:
    """One model of a zoo: what the paper calls it, and where it can be had."""

    paper: str
    accuracy: float | None
    """Top-1 on ImageNet in per cent that the paper gives for its own weights; None where it gives none."""
    library: str
    name: str
    instead: str | None = None
    """How it differs from the paper's model, where no library has that."""

    @property
    def file_name(self) -> str:
        return f"{self.name}.onnx"

    def source(self, *, trained: bool) -> str:
        """Where a file of it comes from, for the file's metadata."""
        return f"{self.library}/{self.name}, {'default weights' if trained else 'random weights'}"

    @property
    def installed(self) -> bool:
        """Whether its library is there to make it."""
        return is_installed(self.library)


@dataclass(frozen=True)
class Zoo:
    """A named list of models."""

    name: str
    about: str
    members: tuple[Member, ...]


def named_zoos() -> dict[str, Zoo]:
    """The paper's zoos, by name."""
    tables = tomllib.loads(resources.files("recipes").joinpath("zoos.toml").read_text())
    return {name: Zoo(name, table["about"], tuple(map(_member, table["members"]))) for name, table in tables.items()}


def _member(entry: dict[str, object]) -> Member:
    library, name = str(entry["model"]).split("/")
    accuracy, instead = entry.get("accuracy"), entry.get("instead")
    return Member(
        paper=str(entry["paper"]),
        accuracy=accuracy if isinstance(accuracy, float) else None,
        library=library,
        name=name,
        instead=None if instead is None else str(instead),
    )


def find_zoo(name: str) -> Zoo:
    """The zoo of that name. Raises MixMixError naming the nearest one."""
    zoos = named_zoos()
    if name == "embedded":
        raise MixMixError("the zoo embedded is made of files and shown in another way: name it alone")
    if name not in zoos:
        known = (*zoos, "embedded")
        raise MixMixError(f"there is no zoo {name!r}{nearest(name, known)}: choose one of {', '.join(known)}")
    return zoos[name]


@dataclass(frozen=True)
class Exported:
    """What became of a zoo's members: files written, files that were there, and what could not be had, with reasons."""

    written: list[Path]
    kept: list[Path]
    failed: dict[str, str]


def export_embedded(directory: Path, *, overwrite: bool = False) -> Exported:
    """Copy the embedded models, BatchNorm kept; one that is there stays.

    Raises OutputError where the folder cannot be made.
    """
    make_folder(directory)
    done = Exported([], [], {})
    for source in map(model_path, FAMILIES):
        path, content = directory / source.name, source.read_bytes()
        try:
            if path.is_file() and path.read_bytes() == content:
                done.kept.append(path)
            else:
                ensure_writable(path, overwrite=overwrite)
                write_atomically(path, content)
                done.written.append(path)
        except OutputError as error:
            done.failed[source.name] = str(error)
    return done


def make_folder(directory: Path) -> None:
    """Make it where it is not there. Raises OutputError where it cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or "no folder's name"
        raise OutputError(f"{directory} cannot be created ({reason}): choose another output") from error

"""Model zoos: the embedded one, and the paper's, exported from installed model libraries.

The embedded zoo: small Fashion-MNIST classifiers of six families, and labelled images to judge by, trained and exported
by `benchmarks/train_zoo.py`. Fashion-MNIST is (c) 2017 Zalando SE, MIT licence.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError, OutputError, nearest
from converters.export import write_kept
from converters.files import read_model
from converters.load import load_classifier
from converters.outputs import ensure_writable, write_atomically
from recipes.inspect import layer_outputs
from recipes.libraries import create, is_installed
from recipes.progress import Progress, Silent

EMBEDDED = Path(str(resources.files("recipes"))) / "embedded"
FAMILIES = ("plain", "residual", "inverted", "shuffle", "dense", "excite")
SOURCE = "mixmix.source"
"""Metadata key of what an exported file was made from."""
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


def export_zoo(
    zoo: Zoo,
    directory: Path,
    *,
    trained: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    version: str = "",
) -> Exported:
    """Write the members' ONNX files, BatchNorm kept, input spec and source in their metadata; one that is there stays.

    A member that cannot be had does not stop the others. Raises OutputError where the folder cannot be made.
    """
    progress = progress or Silent()
    _make_folder(directory)
    done = Exported([], [], {})
    with progress.task(f"exporting {zoo.name}", len(zoo.members)) as task:
        for member in zoo.members:
            path = directory / member.file_name
            try:
                if path.exists() and not overwrite:
                    _same_source(path, member, trained=trained)
                    done.kept.append(path)
                else:
                    made = create(member.library, member.name, trained=trained)
                    example = torch.zeros(2, made.spec.channel_count, *made.spec.size)
                    facts = {SOURCE: member.source(trained=trained), "mixmix.version": version}
                    write_kept(made.module, example, path, made.spec, facts)
                    done.written.append(path)
            except MixMixError as error:
                done.failed[member.file_name] = str(error)
            task.advance(1, member.name)
    return done


def export_embedded(directory: Path, *, overwrite: bool = False) -> Exported:
    """Copy the embedded models, BatchNorm kept; one that is there stays.

    Raises OutputError where the folder cannot be made.
    """
    _make_folder(directory)
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


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or "no folder's name"
        raise OutputError(f"{directory} cannot be created ({reason}): choose another output") from error


def _same_source(path: Path, member: Member, *, trained: bool) -> None:
    """Raise OutputError where the file at `path` is another model, or has other weights, than what would be written."""
    found, wanted = read_model(path).model.metadata_props.get(SOURCE), member.source(trained=trained)
    if found != wanted:
        raise OutputError(
            f"{path} is {found or 'of another origin'}, not {wanted}: move it, or replace it with --force"
        )


@dataclass(frozen=True)
class Fact:
    """What matters about one file in a zoo."""

    path: Path
    classes: int
    parameters: int
    batchnorms: int
    width: int
    """Units of its widest layer: elements of a layer's output for one image."""


@dataclass(frozen=True)
class ZooFacts:
    """A zoo of files, and the number of models that theorem 4.2 asks for.

    Networks of width w on inputs of dimension d represent any function together when m >= ceil((d + 1) / w).
    """

    models: list[Fact]
    dimension: int
    """d: numbers in the largest input of any of them."""
    width: int
    """w: of the narrowest of them."""

    @property
    def needed(self) -> int:
        return -(-(self.dimension + 1) // self.width)


def show_files(classifiers: Sequence[Classifier], progress: Progress | None = None) -> ZooFacts:
    """Convert, check and measure each model. Raises MixMixError for one that cannot be converted."""
    progress = progress or Silent()
    facts, dimension = [], 0
    with progress.task("measuring models", len(classifiers)) as task:
        for classifier in classifiers:
            module = to_torch(classifier)
            values = layer_outputs(module)
            facts.append(
                Fact(
                    path=classifier.path,
                    classes=values[module.logits_name].shape[1],
                    parameters=classifier.parameter_count(),
                    batchnorms=len(module.batchnorms()),
                    width=max(value.numel() for value in values.values()),
                )
            )
            spec = classifier.spec
            dimension = max(dimension, spec.channel_count * spec.size[0] * spec.size[1])
            task.advance(1, classifier.name)
    return ZooFacts(facts, dimension, min(fact.width for fact in facts))


def embedded_files() -> list[Classifier]:
    """The embedded models, BatchNorm kept."""
    return [load_classifier(model_path(name)) for name in FAMILIES]

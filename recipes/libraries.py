"""Models of installed libraries, with trained weights and what they expect of an image, and zoos of them as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from converters.errors import MixMixError, ModelError, OutputError
from converters.export import write_kept
from converters.files import read_model
from converters.input_spec import InputSpec
from recipes.progress import Progress, Silent
from recipes.zoo import Exported, Member, Zoo, is_installed, make_folder

IMAGENET = "imagenet-1k"
LIBRARIES = ("timm", "torchvision")
SOURCE = "mixmix.source"
"""Metadata key of what an exported file was made from."""


class LibraryError(MixMixError):
    """A model that no installed library has, or whose weights cannot be had."""


@dataclass(frozen=True)
class Made:
    """A model in evaluation mode, and its input."""

    module: nn.Module
    spec: InputSpec


def create(library: str, name: str, *, trained: bool = True) -> Made:
    """The model `name` of `library`, with its default ImageNet weights, or random ones unless `trained`.

    Raises LibraryError with what to do.
    """
    if library not in LIBRARIES:
        raise LibraryError(f"{library} is no model library that is known here: use {' or '.join(LIBRARIES)}")
    if not is_installed(library):
        raise LibraryError(f"{library} is not installed: run pip install {library}")
    make = _from_timm if library == "timm" else _from_torchvision
    try:
        made = make(name, trained)
    except LibraryError:
        raise
    except Exception as error:  # whatever a library or its download runs into
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LibraryError(
            f"{library}/{name} could not be made ({reason}): see to the network and its cache"
        ) from error
    made.module.eval()
    return made


def _from_torchvision(name: str, trained: bool) -> Made:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise LibraryError(f"torchvision has no classifier {name!r}: update it")
    weights = models.get_model_weights(name).DEFAULT
    shown = weights.transforms()
    side = shown.crop_size[0]
    spec = InputSpec(
        size=(side, side), mean=tuple(shown.mean), std=tuple(shown.std), labels=IMAGENET, source="metadata"
    )
    return Made(models.get_model(name, weights=weights if trained else None), spec)


def _from_timm(name: str, trained: bool) -> Made:
    import timm

    if not timm.is_model(name):
        raise LibraryError(f"timm has no model {name!r}: update it")
    module = timm.create_model(name, pretrained=trained)
    shown = module.pretrained_cfg
    channels, height, width = shown["input_size"]
    labels = IMAGENET if shown["num_classes"] == 1000 else None
    spec = InputSpec(
        size=(height, width), channels="rgb" if channels == 3 else channels, mean=tuple(shown["mean"]),
        std=tuple(shown["std"]), labels=labels, source="metadata",
    )  # fmt: skip
    return Made(module, spec)


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
    make_folder(directory)
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


def _same_source(path: Path, member: Member, *, trained: bool) -> None:
    """Raise OutputError where the file at `path` is another model, or has other weights, than what would be written."""
    wanted = member.source(trained=trained)
    try:
        found = read_model(path).model.metadata_props.get(SOURCE)
    except ModelError as error:
        remedy = "move it" if path.is_dir() else "move it, or replace it with --force"
        raise OutputError(f"{path} is not {wanted} ({error}): {remedy}") from None
    if found != wanted:
        raise OutputError(
            f"{path} is {found or 'of another origin'}, not {wanted}: move it, or replace it with --force"
        )

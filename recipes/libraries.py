"""Models of installed libraries, with trained weights and what they expect of an image."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from torch import nn

from converters.errors import MixMixError
from converters.input_spec import InputSpec

IMAGENET = "imagenet-1k"
LIBRARIES = ("timm", "torchvision")


class LibraryError(MixMixError):
    """A model that no installed library has, or whose weights cannot be had."""


@dataclass(frozen=True)
class Made:
    """A model in evaluation mode, and its input."""

    module: nn.Module
    spec: InputSpec


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


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

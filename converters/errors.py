"""Errors that a user can act on. Each message is one sentence: what, where, and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixMixError(Exception):
    """Base of every error that the command line shows as one sentence with exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names from a file may hold line breaks


class ModelError(MixMixError):
    """A file that is missing, damaged, not ONNX, or not an image classifier."""


class UnsupportedOperatorError(ModelError):
    """An operator that cannot be converted; names the node, the operator and the opset."""


class ConversionError(ModelError):
    """The torch module and onnxruntime disagree; names the first value that differs."""


class BrokenLibraryError(MixMixError):
    """A library that is installed and cannot be imported."""


class SpecError(MixMixError):
    """An input specification that is malformed or does not fit the model."""


class OutputError(MixMixError):
    """An output that exists already or cannot be written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is nearest to a misspelt one; empty where none is known."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.0)
    return f" (the nearest is {close[0]!r})" if close else ""

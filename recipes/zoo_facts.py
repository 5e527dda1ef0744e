"""What a zoo of files is: what each model measures, and how many of them the theory asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from recipes.inspect import layer_outputs
from recipes.progress import Progress, Silent
from recipes.zoo import FAMILIES, model_path


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

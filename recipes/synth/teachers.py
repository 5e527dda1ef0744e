"""The models that images are made from: where their statistics are read, and whose labels mean something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.errors import MixMixError, SpecError
from converters.input_spec import InputSpec
from converters.torch_module import BatchNorm, Segment, TorchClassifier
from recipes.evenness import EvenValue, even_values
from recipes.synth import objectives
from recipes.synth.settings import SynthSettings
from recipes.synth.statistics import Observer, Statistics

LEAST_SPAN, MOST_SPAN = 1.5, 10.0
"""Standard deviations that the pixel range has in models that take normalised images: 2 where it becomes [-1, 1], 4.4
by ImageNet's."""
PLAIN_MEAN, PLAIN_DEVIATION = 0.5, 0.25
"""Of pixels, where a model's own say nothing of images."""


class SynthesisError(MixMixError):
    """Models that no image can be made from, or an optimisation that went astray."""


@dataclass(frozen=True)
class Teacher:
    """One model of the zoo: which of its layers are looked at, and whether its classes are the target's."""

    name: str
    module: TorchClassifier
    norms: list[BatchNorm]
    evens: list[EvenValue]
    """Where even channels are asked for."""
    labels: bool
    segment: Segment
    runs_smaller: bool

    def classes(self, labels: Tensor) -> Tensor:
        """The model's own classes for labels."""
        return labels + self.module.spec.offset

    def input_size(self, scale: float) -> tuple[int, int]:
        """The height and width to run at when images have `scale` times their full size."""
        height, width = self.module.spec.size
        if scale == 1 or not self.runs_smaller:
            return height, width
        return max(1, round(height * scale)), max(1, round(width * scale))

    def look(self, pixels: Tensor, scale: float = 1.0, *, closely: bool = True) -> tuple[dict[str, Statistics], Tensor]:
        """Statistics and logits of canonical images in [0, 1].

        The former are of BatchNorm inputs and of `evens`, and none unless `closely`.
        """
        module = self.module
        x = module.spec.to_input(pixels, self.input_size(scale)).contiguous(memory_format=torch.channels_last)
        axes = {norm.input: 1 for norm in self.norms} | {value.name: value.axis for value in self.evens}
        observer = Observer(axes if closely else {})
        logits = self.segment({module.input_name: x}, transforms=observer.transforms)[module.logits_name]
        return observer.statistics, logits

    def factors(self, settings: SynthSettings) -> dict[str, float]:
        """What each of its loss terms is multiplied with, by name: of both kinds of values, each counts alike."""
        values = max(1, len(self.norms) + len(self.evens))
        return {
            f"batchnorm/{self.name}": settings.batchnorm * len(self.norms) / values,
            f"unevenness/{self.name}": settings.unevenness * len(self.evens) / values,
            f"label/{self.name}": settings.label,
        }

    def statistics_loss(self, statistics: Mapping[str, Statistics], *, relative: bool = False) -> dict[str, Tensor]:
        """The loss terms, by name, of what `look` saw closely."""
        terms = {}
        if self.norms:
            terms[f"batchnorm/{self.name}"] = objectives.batchnorm_loss(statistics, self.norms, relative=relative)
        if self.evens:
            names = [value.name for value in self.evens]
            terms[f"unevenness/{self.name}"] = objectives.unevenness_loss(statistics, names)
        return terms


def label_space(module: TorchClassifier, classes: int) -> str:
    """What two models must share for one's labels to mean something to the other; `classes` without the background."""
    return module.spec.labels or f"{classes} classes"


@torch.no_grad()
def _classes(module: TorchClassifier) -> int:
    """Those that labels name: class 0 is left out where it is background."""
    height, width = module.spec.size
    pixels = torch.zeros(1, module.spec.channel_count, height, width, device=module.device)
    count = module(module.spec.to_input(pixels)).shape[1] - module.spec.offset
    if count < 1:
        raise SpecError(
            f"{module.classifier.path} has no class left behind an offset of {module.spec.offset}: correct the offset"
        )
    return count


@torch.no_grad()
def _runs_smaller(module: TorchClassifier, scale: float) -> bool:
    """Whether the graph also computes at `scale` times its size (pooled heads do, flattened ones do not)."""
    height, width = (max(1, round(side * scale)) for side in module.spec.size)
    pixels = torch.zeros(2, module.spec.channel_count, height, width, device=module.device)
    try:
        return module(module.spec.to_input(pixels, (height, width))).shape[0] == 2
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, MixMixError):
        return False


def _distinct_names(modules: Sequence[TorchClassifier]) -> list[str]:
    """File names without suffix; of equal ones, the second is called `name.2`."""
    names: list[str] = []
    for module in modules:
        name, count = module.classifier.name, 1
        while name in names:
            count += 1
            name = f"{module.classifier.name}.{count}"
        names.append(name)
    return names


def make_teachers(modules: Sequence[TorchClassifier], settings: SynthSettings) -> tuple[list[Teacher], int]:
    """Those of the models that contribute a loss term, and the number of classes of the first model's label space.

    Raises SynthesisError when no model has BatchNorm statistics, and neither labels nor even channels are asked for or
    can be had.
    """
    classes = [_classes(module) for module in modules]
    space = label_space(modules[0], classes[0])
    scales = {stage.scale for stage in settings.stages if stage.scale != 1}
    teachers = []
    for module, count, name in zip(modules, classes, _distinct_names(modules), strict=True):
        norms = module.batchnorms() if settings.batchnorm else []
        shares = 1 < count == classes[0] and label_space(module, count) == space  # one class tells nothing apart
        teachers.append(
            Teacher(
                name=name,
                module=module,
                norms=norms,
                evens=even_values(module) if settings.unevenness else [],
                labels=shares and settings.label > 0,
                segment=module.segment([module.input_name], [module.logits_name]),
                runs_smaller=all(_runs_smaller(module, scale) for scale in sorted(scales)),
            )
        )
    teaching = [t for t in teachers if t.labels or t.evens or t.norms]
    if not teaching:
        names = ", ".join(str(module.classifier.path) for module in modules)
        if settings.label > 0 and set(classes) == {1}:
            raise SynthesisError(
                f"{names}: a single logit, whose label tells nothing apart, and neither BatchNorm statistics nor"
                " even channels to ask for: add models that have (--zoo; in synth, by name), or give images with --data"
            )
        raise SynthesisError(
            f"{names}: no BatchNorm statistics to invert: add models exported with BatchNorm kept (--zoo; in synth, by"
            " name), or leave the recipe to be chosen"
        )
    return teaching, classes[0]


def canonical_spec(teachers: Sequence[Teacher]) -> InputSpec:
    """The input spec whose channels and normalised units the images have: of the models with most channels, the first.

    Raises SpecError where one image cannot serve all: gray and three colours are adapted, other channels are not.
    """
    most = max(teachers, key=lambda teacher: teacher.module.spec.channel_count).module.spec
    for teacher in teachers:
        count = teacher.module.spec.channel_count
        if count != most.channel_count and (count, most.channel_count) != (1, 3):
            odd = teacher if most.channel_count == 3 else max(teachers, key=lambda t: t.module.spec.channel_count)
            raise SpecError(
                f"{odd.module.classifier.path} takes {odd.module.spec.channel_count} channels and other models do not:"
                " make its images without them"
            )
    return most


def working_units(spec: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1], in whose units images are optimised: one a channel, in RGB.

    Those that the canonical model was trained with, as long as they are about those of images. Where the model
    normalises within, or takes 0 to 255 as it is, the spec's are not: a step or a roughness of one size would be far
    too little for one model or far too much for another.
    """
    mean, std = (tuple(value / spec.scale for value in values) for values in (spec.mean, spec.std))
    if spec.channels == "bgr":
        mean, std = mean[::-1], std[::-1]
    if not all(LEAST_SPAN <= 1 / each <= MOST_SPAN for each in std):
        return (PLAIN_MEAN,) * len(mean), (PLAIN_DEVIATION,) * len(std)
    return mean, std


@torch.no_grad()
def judge(teachers: Sequence[Teacher], pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Each model's losses of statistics, unevenness and labels, of images neither augmented nor mixed."""
    losses: dict[str, float] = {}
    for teacher in teachers:
        statistics, logits = teacher.look(pixels.to(teacher.module.device))
        losses |= {name: float(loss) for name, loss in teacher.statistics_loss(statistics).items()}
        if teacher.labels:
            losses[f"label/{teacher.name}"] = float(F.cross_entropy(logits, teacher.classes(labels.to(logits.device))))
    return losses

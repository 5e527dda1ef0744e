"""From classifiers to images.

The way of a batch: noise or dead leaves in normalised units -> pixels -> augmentation -> mixing -> each model's own
input -> tapped BatchNorm inputs and logits -> weighted loss -> Adam step -> clip to the valid pixel range. Low
resolution first. A finished batch is rounded to 8 bits, judged again as it will be read back, and written as one shard.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.errors import MixMixError
from converters.torch_module import BatchNorm, Segment, TorchClassifier
from recipes.image_store import ImageStore
from recipes.images import from_bytes, load_images, to_bytes
from recipes.progress import Progress, Silent, Task
from recipes.synth import objectives
from recipes.synth.augment import augment
from recipes.synth.mixing import Mix, draw_mix, mixed_cross_entropy
from recipes.synth.procedural import dead_leaves
from recipes.synth.settings import Stage, SynthSettings


class SynthesisError(MixMixError):
    """Models that no image can be made from, or an optimisation that went astray."""


@dataclass(frozen=True)
class Synthesis:
    """The result. `losses` are means over shards, measured on the 8-bit images as read back."""

    directory: Path
    images: int
    seconds: float
    models: list[str]
    left_out: list[str]
    """Models that have nothing to say: no statistics, and no label loss is asked for."""
    losses: dict[str, float]


@dataclass(frozen=True)
class Teacher:
    """One model of the zoo: where its statistics are read, and whether its classes are the target's."""

    name: str
    module: TorchClassifier
    norms: list[BatchNorm]
    labels: bool
    segment: Segment
    runs_smaller: bool

    def input_size(self, scale: float) -> tuple[int, int]:
        """The height and width to run at when images have `scale` times their full size."""
        height, width = self.module.spec.size
        if scale == 1 or not self.runs_smaller:
            return height, width
        return max(1, round(height * scale)), max(1, round(width * scale))


def label_space(module: TorchClassifier, classes: int) -> str:
    """What two models must share for one's labels to mean something to the other."""
    return module.spec.labels or f"{classes} classes"


@torch.no_grad()
def _classes(module: TorchClassifier) -> int:
    height, width = module.spec.size
    pixels = torch.zeros(1, module.spec.channel_count, height, width, device=module.device)
    return module(module.spec.to_input(pixels)).shape[1]


@torch.no_grad()
def _runs_smaller(module: TorchClassifier, scale: float) -> bool:
    """Whether the graph also computes at `scale` times its size (pooled heads do, flattened ones do not)."""
    height, width = (max(1, round(side * scale)) for side in module.spec.size)
    pixels = torch.zeros(2, module.spec.channel_count, height, width, device=module.device)
    try:
        return module(module.spec.to_input(pixels, (height, width))).shape[0] == 2
    except (RuntimeError, ValueError):
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

    Raises SynthesisError when no model has BatchNorm statistics and no label loss is asked for.
    """
    classes = [_classes(module) for module in modules]
    space = label_space(modules[0], classes[0])
    smallest = min(stage.scale for stage in settings.stages)
    teachers = []
    for module, count, name in zip(modules, classes, _distinct_names(modules), strict=True):
        norms = module.batchnorms()
        shares = count == classes[0] and label_space(module, count) == space
        taps = [norm.input for norm in norms] + [module.logits_name]
        teachers.append(
            Teacher(
                name=name,
                module=module,
                norms=norms,
                labels=shares and settings.label > 0,
                segment=module.segment([module.input_name], dict.fromkeys(taps)),
                runs_smaller=smallest == 1 or _runs_smaller(module, smallest),
            )
        )
    teaching = [t for t in teachers if t.labels or (t.norms and settings.batchnorm > 0)]
    if not teaching:
        names = ", ".join(str(module.classifier.path) for module in modules)
        raise SynthesisError(
            f"{names}: no BatchNorm statistics to invert: name models exported with BatchNorm kept (quantize: --zoo)"
        )
    return teaching, classes[0]


def synthesize(
    modules: Sequence[TorchClassifier],
    directory: Path,
    settings: SynthSettings,
    *,
    recipe: str = "default",
    size: tuple[int, int] | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    versions: Mapping[str, str] | None = None,
) -> Synthesis:
    """Make `settings.images` images from the models and write them to `directory`.

    All randomness comes from `seed` and the shard's number, so shards do not depend on one another. Raises MixMixError
    when the models or the output cannot be used.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    teachers, classes = make_teachers(modules, settings)
    used = {teacher.module for teacher in teachers}
    left_out = [str(module.classifier.path) for module in modules if module not in used]
    if left_out:
        progress.say(f"left out, without BatchNorm statistics: {', '.join(left_out)}")
    height, width = (max(module.spec.size[axis] for module in modules) for axis in (0, 1))
    full = size or (height, width)
    identity: dict[str, Any] = {
        "recipe": recipe,
        "settings": settings.model_dump(mode="json"),
        "size": list(full),
        "seed": seed,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), **(versions or {})},
        "models": [
            {
                "name": teacher.name,
                "sha256": teacher.module.classifier.sha256,
                "input": teacher.module.spec.model_dump(mode="json"),
                "batchnorms": len(teacher.norms),
                "labels": teacher.labels,
            }
            for teacher in teachers
        ],
    }
    store = ImageStore(directory, identity, resume=resume, overwrite=overwrite)
    counts = [settings.batch] * (settings.images // settings.batch)
    if settings.images % settings.batch:
        counts.append(settings.images % settings.batch)
    missing = [index for index in range(len(counts)) if index not in store.finished_shards]
    with progress.task("synthesizing images", settings.steps * len(missing)) as task:
        for index in missing:
            begun = time.perf_counter()
            labels = (torch.arange(counts[index]) + index * settings.batch) % classes
            shard_seed = _shard_seed(seed, index)
            pixels = Batch(teachers, settings, full, labels, shard_seed).optimise(task)
            losses = judge(teachers, from_bytes(to_bytes(pixels)), labels)
            facts = {"losses": losses, "seconds": round(time.perf_counter() - begun, 3)}
            store.add(index, shard_seed, pixels, labels, facts)
    final = {name: _mean([shard["losses"][name] for shard in store.shards]) for name in store.shards[0]["losses"]}
    seconds = time.perf_counter() - started
    spent = sum(shard["seconds"] for shard in store.shards)  # a resumed call keeps the time of earlier ones
    store.finish(load_images(directory, 64).pixels, {"losses": final, "seconds": round(spent, 3)})
    return Synthesis(directory, settings.images, seconds, [teacher.name for teacher in teachers], left_out, final)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _shard_seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % (2**63)


class Batch:
    """One batch of images being optimised."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        settings: SynthSettings,
        size: tuple[int, int],
        labels: Tensor,
        seed: int,
    ) -> None:
        self.teachers, self.settings, self.size = teachers, settings, size
        first = teachers[0].module
        self.device = first.device
        self.labels = labels.to(self.device)
        self.generator = torch.Generator().manual_seed(seed)
        spec = first.spec
        shape = (1, -1, 1, 1)
        mean, std = (
            torch.tensor(values, device=self.device).view(shape) / spec.scale for values in (spec.mean, spec.std)
        )
        if spec.channels == "bgr":
            mean, std = mean.flip(1), std.flip(1)
        self.mean, self.std = mean, std
        self.low, self.high = -mean / std, (1 - mean) / std
        self.channels = spec.channel_count
        self.weights = objectives.LearnedWeights()

    def optimise(self, task: Task) -> Tensor:
        """Run all stages; pixels [N, C, H, W] in [0, 1] on the CPU. Raises SynthesisError when the loss diverges."""
        images: Tensor | None = None
        for stage in self.settings.stages:
            height, width = (max(1, round(side * stage.scale)) for side in self.size)
            if images is None:
                images = self._start((height, width)).to(self.device)
            else:
                images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
            images = self._stage(self._clip(images), stage, task)
        assert images is not None
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        return (self._clip(images) * self.std + self.mean).clamp(0, 1).cpu()

    def _start(self, size: tuple[int, int]) -> Tensor:
        """What optimisation begins with, in normalised units, on the CPU."""
        count = len(self.labels)
        if self.settings.start == "leaves":
            return (dead_leaves(count, self.channels, size, self.generator) - self.mean.cpu()) / self.std.cpu()
        return torch.randn((count, self.channels, *size), generator=self.generator)

    def _clip(self, images: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(images, self.high), self.low)

    def _stage(self, images: Tensor, stage: Stage, task: Task) -> Tensor:
        settings = self.settings
        images = images.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([images], lr=settings.rate, betas=settings.betas)
        alphas: torch.optim.Adam | None = None
        for step in range(stage.steps):
            optimizer.param_groups[0]["lr"] = settings.rate * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
            terms, prior = self._terms(images, stage.scale)
            new = [name for name in terms if name not in self.weights.first]
            for name in new:
                self.weights.register(name, float(terms[name].detach()), self.device)
            if settings.weight_rate and (alphas is None or new):
                alphas = torch.optim.Adam(self.weights.alpha.values(), lr=settings.weight_rate, betas=settings.betas)
            factors = {name: settings.label if name.startswith("label") else settings.batchnorm for name in terms}
            loss = self.weights.combine(terms, factors) / len(self._drawn) + prior
            optimizer.zero_grad(set_to_none=True)
            if alphas is not None:
                alphas.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if alphas is not None:
                alphas.step()
            with torch.no_grad():
                images.copy_(self._clip(images))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise SynthesisError(f"the loss became {value} at step {step}: lower the rate with --set rate=0.1")
            task.advance(1, f"loss {value:.3f}")
        return images.detach()

    def _terms(self, images: Tensor, scale: float) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms by name for one step, and the image prior."""
        settings = self.settings
        pixels = augment(images * self.std + self.mean, settings, self.generator)
        size = (pixels.shape[2], pixels.shape[3])
        mix = draw_mix(len(pixels), size, settings.box, self.generator) if settings.mixing != "none" else None
        mixed = mix.apply(pixels) if mix is not None else pixels
        terms: dict[str, Tensor] = {}
        self._drawn = self._draw_models()
        for teacher in self._drawn:
            shown = mixed if settings.mixing == "all" or mix is None else pixels
            values = self._run(teacher, shown, scale)
            if teacher.norms and settings.batchnorm:
                terms[f"batchnorm/{teacher.name}"] = objectives.batchnorm_loss(
                    values, teacher.norms, relative=settings.relative
                )
            if teacher.labels:
                if mix is not None and settings.mixing == "label":
                    values = self._run(teacher, mixed, scale)
                terms[f"label/{teacher.name}"] = self._label_loss(values[teacher.module.logits_name], mix)
        return terms, self._prior(images)

    def _prior(self, images: Tensor) -> Tensor:
        variation, magnitude = self.settings.variation, self.settings.magnitude
        if self.settings.prior == "norm":
            return objectives.deep_inversion_prior(images, variation, magnitude)
        return variation * objectives.total_variation(images) + magnitude * images.square().mean()

    def _draw_models(self) -> list[Teacher]:
        count = self.settings.models_per_step
        if count is None or count >= len(self.teachers):
            return list(self.teachers)
        chosen = torch.randperm(len(self.teachers), generator=self.generator)[:count]
        return [self.teachers[index] for index in sorted(chosen.tolist())]

    def _run(self, teacher: Teacher, pixels: Tensor, scale: float) -> dict[str, Tensor]:
        module = teacher.module
        x = module.spec.to_input(pixels, teacher.input_size(scale)).contiguous(memory_format=torch.channels_last)
        return teacher.segment({module.input_name: x})

    def _label_loss(self, logits: Tensor, mix: Mix | None) -> Tensor:
        return F.cross_entropy(logits, self.labels) if mix is None else mixed_cross_entropy(logits, self.labels, mix)


@torch.no_grad()
def judge(teachers: Sequence[Teacher], pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Each model's statistics loss and cross-entropy on finished images, neither augmented nor mixed."""
    losses: dict[str, float] = {}
    for teacher in teachers:
        module = teacher.module
        values = teacher.segment({module.input_name: module.spec.to_input(pixels.to(module.device))})
        if teacher.norms:
            losses[f"batchnorm/{teacher.name}"] = float(objectives.batchnorm_loss(values, teacher.norms))
        if teacher.labels:
            logits = values[module.logits_name]
            losses[f"label/{teacher.name}"] = float(F.cross_entropy(logits, labels.to(logits.device)))
    return losses

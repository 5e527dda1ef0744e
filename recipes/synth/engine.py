"""From classifiers to images.

The way of a batch: noise or dead leaves in normalised units -> pixels -> augmentation -> mixing -> each model's own
input -> tapped values (BatchNorm inputs, and those that are to be even) and logits -> weighted loss -> Adam step ->
clip to the valid pixel range. Low resolution first. A finished batch is rounded to 8 bits, judged again as it will be
read back, and written as one shard.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.errors import MixMixError, OutputError
from converters.torch_module import TorchClassifier
from recipes.augment import Augmentation
from recipes.devices import choose_precision, computing_in
from recipes.image_store import PREVIEW_IMAGES, ImageStore
from recipes.images import from_bytes, load_images, to_bytes
from recipes.memory import keep_freed_memory
from recipes.progress import Progress, Silent, Task
from recipes.ranks import Ranks
from recipes.synth import objectives
from recipes.synth.mixing import Mix, draw_mix, mixed_cross_entropy
from recipes.synth.procedural import dead_leaves
from recipes.synth.settings import Stage, SynthSettings
from recipes.synth.statistics import Statistics
from recipes.synth.teachers import SynthesisError, Teacher, canonical_spec, judge, make_teachers, working_units


@dataclass(frozen=True)
class Synthesis:
    """The result. `losses` are means over shards, measured on the 8-bit images as read back."""

    directory: Path
    images: int
    seconds: float
    """Of this call."""
    seconds_per_image: float
    """Of all calls that made the set, per process."""
    models: list[str]
    left_out: list[str]
    """Models that have nothing to say: no statistics, and neither labels nor even channels are asked of them."""
    losses: dict[str, float]
    retried: int = 0
    """How many batches diverged and were made again from another seed."""


ATTEMPTS = 3
"""How many seeds a batch is tried with."""
LOOK_EVERY = 8
"""Steps between looks at the loss."""
LEAST_GAIN = 1e-3
"""What counts as a fall of the loss, as a share of it."""
CLIPPED = 0.99
"""An image with more than this share of its values at the limits of the pixel range shows nothing."""
MOST_CLIPPED = 0.1
"""Share of such images that a batch may have: a dark one among many is no divergence."""


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
    ranks: Ranks | None = None,
) -> Synthesis:
    """Make `settings.images` images from the models and write them to `directory`.

    All randomness comes from `seed` and the shard's number, so shards do not depend on one another, and several `ranks`
    deal them out. Raises MixMixError when the models or the output cannot be used.
    """
    started = time.perf_counter()
    progress, ranks = progress or Silent(), ranks or Ranks()
    if modules[0].device.type == "cpu":
        keep_freed_memory()
    teachers, classes = make_teachers(modules, settings)
    canonical_spec(teachers)
    used = {teacher.module for teacher in teachers}
    left_out = [str(module.classifier.path) for module in modules if module not in used]
    if left_out:
        progress.say(f"left out, as nothing can be asked of them: {', '.join(left_out)}")
    height, width = (max(module.spec.size[axis] for module in modules) for axis in (0, 1))
    full = size or (height, width)
    store = ImageStore(directory, _identity(teachers, settings, recipe, full, seed, classes, versions or {}))
    counts = [settings.batch] * (settings.images // settings.batch)
    if settings.images % settings.batch:
        counts.append(settings.images % settings.batch)
    done = {shard["index"] for shard in store.begin(resume=resume, overwrite=overwrite)} if ranks.leads else set()
    missing = ranks.deal(ranks.share([index for index in range(len(counts)) if index not in done]))
    try:
        with progress.task("synthesizing images", settings.steps * len(missing)) as task:
            labels = deal_labels(settings.images, classes).split(settings.batch)
            for index in missing:
                store.add(index, *_make_shard(teachers, settings, full, labels[index], (seed, index), task))
        ranks.wait()
    except BaseException as stop:
        if ranks.leads:
            with suppress(MixMixError):  # the stop is what the user should hear of
                store.close()  # what is finished can be used as it is
            if isinstance(stop, KeyboardInterrupt):
                kept = sum(shard["images"] for shard in store.records())
                progress.say(f"{kept} of {settings.images} images are in {directory}")
        raise
    shards = store.records()
    if {shard["index"] for shard in shards} != set(range(len(counts))):
        raise OutputError(
            f"{directory} does not hold all {len(counts)} batches: it has to be a folder that all processes share, and"
            " --resume makes what is missing"
        )
    spent = sum(shard["seconds"] for shard in shards)  # a resumed call keeps the time of earlier ones
    final = {name: _mean([shard["losses"][name] for shard in shards]) for name in shards[0]["losses"]}
    if ranks.leads:
        store.close()
        store.finish(load_images(directory, PREVIEW_IMAGES).pixels, {"losses": final, "seconds": round(spent, 3)})
    return Synthesis(
        directory=directory,
        images=settings.images,
        seconds=time.perf_counter() - started,
        seconds_per_image=spent / settings.images,
        models=[teacher.name for teacher in teachers],
        left_out=left_out,
        losses=final,
        retried=sum(shard["attempts"] - 1 for shard in shards),
    )


def deal_labels(images: int, classes: int) -> Tensor:
    """Labels [images] of a set: each class as often as any other or, of more classes than images, every so many-th."""
    positions = torch.arange(images)
    return positions % classes if images >= classes else positions * classes // images


def _identity(
    teachers: Sequence[Teacher],
    settings: SynthSettings,
    recipe: str,
    size: tuple[int, int],
    seed: int,
    classes: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that decides the images."""
    return {
        "recipe": recipe,
        "settings": settings.model_dump(mode="json"),
        "size": list(size),
        "seed": seed,
        "classes": classes,
        "units": working_units(canonical_spec(teachers)),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), **versions},
        "models": [
            {
                "name": teacher.name,
                "sha256": teacher.module.classifier.sha256,
                "input": teacher.module.spec.model_dump(mode="json"),
                "batchnorms": len(teacher.norms),
                "evens": len(teacher.evens),
                "labels": teacher.labels,
            }
            for teacher in teachers
        ],
    }


def _make_shard(
    teachers: Sequence[Teacher],
    settings: SynthSettings,
    size: tuple[int, int],
    labels: Tensor,
    number: tuple[int, int],
    task: Task,
) -> tuple[int, Tensor, Tensor, dict[str, Any]]:
    """One batch for the (seed, index) of `number`: seed used, pixels, labels, and facts to record.

    A batch that diverges is made again from another seed. Raises SynthesisError when none of `ATTEMPTS` came through.
    """
    begun = time.perf_counter()
    for attempt in range(ATTEMPTS):
        seed = _shard_seed(*number, attempt)
        batch = Batch(teachers, settings, size, labels, seed)
        try:
            pixels = batch.optimise(task)
            break
        except DivergedError as error:
            task.advance(-batch.done)
            reason = error
    else:
        raise SynthesisError(f"{reason}, from {ATTEMPTS} seeds: lower the rate with --set rate={settings.rate / 4:g}")
    losses = judge(teachers, from_bytes(to_bytes(pixels)), labels)
    facts = {"attempts": attempt + 1, "losses": losses, "seconds": round(time.perf_counter() - begun, 3)}
    return seed, pixels, labels, facts


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _shard_seed(seed: int, index: int, attempt: int = 0) -> int:
    return (seed * 1_000_003 + index + attempt * 15_485_863 * 1_000_003) % (2**63)


class Plateau:
    """Whether the loss has stopped falling: `patience` steps without a new best by more than `LEAST_GAIN` of it."""

    def __init__(self, patience: int) -> None:
        self.patience, self.best, self.waited = patience, math.inf, 0

    def reached(self, value: float, steps: int) -> bool:
        """Take in the mean loss of the last `steps` steps. Never with a patience of 0."""
        if value < self.best - LEAST_GAIN * abs(self.best) or math.isinf(self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += steps
        return 0 < self.patience <= self.waited


class DivergedError(Exception):
    """A batch whose loss is no number any more, or whose images show nothing."""


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
        self.device = teachers[0].module.device
        self.labels = labels.to(self.device)
        self.generator = torch.Generator().manual_seed(seed)
        spec = canonical_spec(teachers)
        shape = (1, -1, 1, 1)
        self.mean, self.std = (torch.tensor(each, device=self.device).view(shape) for each in working_units(spec))
        self.low, self.high = -self.mean / self.std, (1 - self.mean) / self.std
        self.channels = spec.channel_count
        self.augmentation = Augmentation(flip=settings.flip, roll=settings.shift, jitter=settings.jitter)
        self.precisions = {
            teacher.name: choose_precision(settings.precision, teacher.module.layers(), self.device)
            for teacher in teachers
        }
        self.factors = {name: factor for teacher in teachers for name, factor in teacher.factors(settings).items()}
        self.weights = objectives.LearnedWeights()
        self.done = 0

    def optimise(self, task: Task) -> Tensor:
        """Run all stages; pixels [N, C, H, W] in [0, 1] on the CPU. Raises DivergedError."""
        images: Tensor | None = None
        for stage in self.settings.stages:
            height, width = (max(1, round(side * stage.scale)) for side in self.size)
            if images is None:
                images = self.start((height, width)).to(self.device)
            else:
                images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
            images = self._stage(self._clip(images), stage, task)
        assert images is not None
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        pixels = (self._clip(images) * self.std + self.mean).clamp(0, 1).cpu()
        levels = torch.from_numpy(to_bytes(pixels))  # a limit that went through mean and std is a limit all the same
        at_limits = ((levels == 0) | (levels == 255)).float().flatten(1).mean(1)
        lost = int((at_limits > CLIPPED).sum())
        if lost > MOST_CLIPPED * len(pixels):
            raise DivergedError(f"{lost} of {len(pixels)} images were driven to the limits of the pixel range")
        return pixels

    def start(self, size: tuple[int, int]) -> Tensor:
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
        plateau = Plateau(settings.patience)
        recent: list[Tensor] = []
        for step in range(stage.steps):
            optimizer.param_groups[0]["lr"] = settings.rate * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
            drawn, terms, prior = self._terms(images, stage.scale)
            new = [name for name in terms if name not in self.weights.first]
            for name in new:
                self.weights.register(name, float(terms[name].detach()), self.device)
            if settings.weight_rate and (alphas is None or new):
                alphas = torch.optim.Adam(self.weights.alpha.values(), lr=settings.weight_rate, betas=settings.betas)
            loss = self.weights.combine(terms, self.factors) / drawn + prior
            optimizer.zero_grad(set_to_none=True)
            if alphas is not None:
                alphas.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if alphas is not None:
                alphas.step()
            with torch.no_grad():
                images.copy_(self._clip(images))
            recent.append(loss.detach())
            if len(recent) < LOOK_EVERY and step + 1 < stage.steps:
                continue
            value = float(torch.stack(recent).mean())  # waits for the device, which is why it is not done at each step
            if not math.isfinite(value):
                raise DivergedError(f"the loss became {value} by step {step + 1}")
            stop = plateau.reached(value, len(recent))
            steps = stage.steps - (step + 1 - len(recent)) if stop else len(recent)
            self.done += steps
            task.advance(steps, f"loss {value:.3f}")
            recent.clear()
            if stop:
                break
        return images.detach()

    def _terms(self, images: Tensor, scale: float) -> tuple[int, dict[str, Tensor], Tensor]:
        """For one step: how many models were drawn, their loss terms by name, and the image prior."""
        settings = self.settings
        pixels = self.augmentation(images * self.std + self.mean, self.generator)
        size = (pixels.shape[2], pixels.shape[3])
        mix = draw_mix(len(pixels), size, settings.box, self.generator) if settings.mixing != "none" else None
        mixed = mix.apply(pixels) if mix is not None else pixels
        terms: dict[str, Tensor] = {}
        drawn = self._draw_models()
        for teacher in drawn:
            shown = mixed if settings.mixing == "all" or mix is None else pixels
            statistics, logits = self._look(teacher, shown, scale)
            terms |= teacher.statistics_loss(statistics, relative=settings.relative)
            if teacher.labels:
                if mix is not None and settings.mixing == "label":
                    _, logits = self._look(teacher, mixed, scale, closely=False)
                terms[f"label/{teacher.name}"] = self._label_loss(logits.float(), teacher.classes(self.labels), mix)
        return len(drawn), terms, self._prior(images)

    def _look(
        self, teacher: Teacher, pixels: Tensor, scale: float, *, closely: bool = True
    ) -> tuple[dict[str, Statistics], Tensor]:
        """`Teacher.look` in the precision that is asked for."""
        with computing_in(self.precisions[teacher.name], self.device):
            return teacher.look(pixels, scale, closely=closely)

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

    def _label_loss(self, logits: Tensor, classes: Tensor, mix: Mix | None) -> Tensor:
        return F.cross_entropy(logits, classes) if mix is None else mixed_cross_entropy(logits, classes, mix)

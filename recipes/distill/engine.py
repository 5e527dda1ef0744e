"""From a teacher, a student and images to a trained student.

The way: pixels -> moved and mixed -> each model's own input -> logits, and the input of the last layer -> divergence
and likeness -> Adam on the student's tensors -> statistics of its BatchNorm -> float tensors -> a copy of the student's
original graph -> onnxruntime. Zeros of a pruned student stay zero.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from converters import writeback
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.edits import Edit, TensorEdit
from converters.errors import MixMixError
from converters.ops.registry import Body
from converters.torch_module import Step, TorchClassifier
from recipes.account import Compression, LayerAccount, account_layer
from recipes.augment import Augmentation
from recipes.checkpoint import Checkpoint
from recipes.distill.losses import likeness_loss
from recipes.distill.settings import DistillSettings
from recipes.images import ImageSet
from recipes.progress import Progress, Silent
from recipes.ranks import ALONE, Part, Ranks
from recipes.reconstruct import Group
from recipes.training import Training, divergence, train
from recipes.workpiece import Result, begin, model_inputs, sample_for_proof

PROVENANCE = "mixmix.distill"
"""Metadata key of a distilled file."""
EPSILON = 1e-5  # BatchNormalization's default
STATISTICS = (3, 4)
"""Operand positions of BatchNormalization's mean and variance."""
SAMPLE = 64
"""Images that the written file is tried on, at most."""


def check_pair(teacher: Classifier, student: Classifier) -> None:
    """Raise MixMixError for two models of which one cannot learn from the other, whatever the images."""
    module = to_torch(writeback.prepare_for_training(student))
    trainable(module)
    check_classes(to_torch(teacher), module, torch.zeros(2, teacher.spec.channel_count, *teacher.spec.size))


def check_count(count: int, source: str) -> None:
    """Raise MixMixError where `source` gives fewer images than can be learned from."""
    if count < 2:
        raise MixMixError(f"{source} comes to one image, and a student learns from batches of at least 2: give more")


@torch.no_grad()
def check_classes(teacher: TorchClassifier, student: TorchClassifier, pixels: Tensor) -> None:
    """Raise MixMixError where the two tell different numbers of classes apart, or cannot take the same pixels."""
    counts = [module(module.spec.to_input(pixels).to(module.device)).shape[1] for module in (teacher, student)]
    if counts[0] != counts[1]:
        raise MixMixError(
            f"{teacher.classifier.path} has {counts[0]} classes and {student.classifier.path} has {counts[1]}:"
            " a student needs its teacher's classes"
        )


def distill(
    teacher: Classifier,
    student: Classifier,
    images: ImageSet,
    output: Path,
    settings: DistillSettings,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> Compression:
    """Train `student` to answer as `teacher` does on `images`, and write it to `output`.

    All `ranks` train, and the first writes. Raises MixMixError for models, images or an output that cannot be used,
    before any long work starts.
    """
    started, progress = time.perf_counter(), progress or Silent()
    student = with_classes_of(teacher, student)
    prepared = writeback.prepare_for_training(student)
    module = begin(prepared, output, device, overwrite=overwrite)
    check_count(len(images), images.source)
    run = _Run(to_torch(teacher).to(module.device), module, images, settings, seed, ranks)
    facts = {"settings": settings.model_dump(), "seed": seed}
    checkpoint = Checkpoint(output, "distill", (run.teacher, run.student), images, facts, progress.say)
    run.train(progress, checkpoint)
    sample = sample_for_proof(prepared, model_inputs(module, ImageSet(images.pixels[:SAMPLE])))
    result = Result(prepared, run.edits(), sample, run.logits(sample), [], run.layer_accounts(), checkpoint=checkpoint)
    asked = {"teacher": teacher.sha256, "images": len(images), "seed": seed, "settings": settings.changed()}
    said = {PROVENANCE: json.dumps(asked), **(provenance or {})}
    return ranks.lead(lambda: result.write(student, output, said, started, overwrite=overwrite))


def with_classes_of(teacher: Classifier, student: Classifier) -> Classifier:
    """The student, its classes numbered and named as the teacher says: it learns the logits one by one."""
    said: dict[str, object] = teacher.spec.model_dump(include={"offset", "labels"}, exclude_unset=True)
    return replace(student, spec=student.spec.model_copy(update=said))


def trainable(module: TorchClassifier) -> dict[str, list[tuple[str, int]]]:
    """Initializers that are trained, each with the nodes (by output) and operands that read it.

    All float tensors of more than one number, but for stored statistics, operands that are sizes or axes, and masks,
    which hold infinities. Raises MixMixError where there is none.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    for step in _learning_steps(module):
        for index, name in enumerate(step.inputs):
            if name and module.is_constant(name) and _is_learned(step, index, module.constant(name)):
                found.setdefault(name, []).append((step.outputs[0], index))
    if not found:
        raise MixMixError(f"{module.classifier.path} has nothing to train: it has no layer with constant weights")
    return found


def _learning_steps(module: TorchClassifier) -> list[Step]:
    """The nodes from the first weighted layer on: what comes before is the normalisation of pixels."""
    layers = {layer.output for layer in module.layers()}
    return list(itertools.dropwhile(lambda step: step.outputs[0] not in layers, module.whole.steps))


def _is_learned(step: Step, index: int, tensor: Tensor) -> bool:
    if index in step.operator.static or (step.op == "BatchNormalization" and index in STATISTICS):
        return False
    return tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.isfinite().all())


class BatchStatistics:
    """BatchNormalization in training: normalises by the batch, and gathers mean and variance [C] over batches."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.sums: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def __call__(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            axes, exact = [axis for axis in range(x.dim()) if axis != 1], x.double()
            found = (exact.sum(axes), exact.square().sum(axes))
            self.sums = found if self.sums is None else (self.sums[0] + found[0], self.sums[1] + found[1])
            self.count += x.numel() // x.shape[1]
        return F.batch_norm(x, None, None, scale, bias, training=True, eps=self.epsilon)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Mean and variance over all that was run without gradients, however it was cut into batches."""
        assert self.sums is not None
        mean = self.sums[0] / self.count
        variance = (self.sums[1] / self.count - mean.square()).clamp_min(0)
        return mean.float(), variance.float()


def whole_batches(x: Tensor, batch: int) -> list[Tensor]:
    """`x` [N, ...] in batches, a last one of less than half joined to the one before it: it would stand for little."""
    parts = list(x.split(batch))
    if len(parts) > 1 and 2 * len(parts[-1]) < batch:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def batch_norm_over(
    part: Part, epsilon: float, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """BatchNormalization in training of a part `x` [n, C, ...] of a batch, by mean and variance of the whole batch.

    torch's SyncBatchNorm is for GPUs alone, and takes a process without images for one with them.
    """
    axes, shape = [axis for axis in range(x.dim()) if axis != 1], [1, -1] + [1] * (x.dim() - 2)
    centred = x - part.mean(x.mean(axes)).view(shape)
    factor = scale * torch.rsqrt(part.mean(centred.square().mean(axes)) + epsilon)
    return centred * factor.view(shape) + bias.view(shape)


class _Run:
    """One distillation in progress."""

    def __init__(
        self,
        teacher: TorchClassifier,
        student: TorchClassifier,
        images: ImageSet,
        settings: DistillSettings,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.teacher, self.student, self.images = teacher, student, images
        self.settings, self.ranks = settings, ranks
        self.generator = torch.Generator().manual_seed(seed)
        self.places = trainable(student)
        self.values = {name: student.constant(name).clone() for name in self.places}
        weights = {layer.weight for layer in student.layers()}
        self.kept = {
            name: value != 0
            for name, value in self.values.items()
            if name in weights and bool((value == 0).any()) and bool((value != 0).any())
        }
        self.norms = {
            step.outputs[0]: BatchStatistics(float(str(step.attributes.get("epsilon", EPSILON))))
            for step in _learning_steps(student)
            if step.op == "BatchNormalization" and settings.statistics
        }
        self._taps = [self._tapped(module) for module in (teacher, student)]
        check_classes(teacher, student, images.pixels[:2])

    def _tapped(self, module: TorchClassifier) -> tuple[str, ...]:
        """The logits, and the input of the last layer where it is computed."""
        layers = module.layers()
        feature = layers[-1].input if layers else module.input_name
        return (module.logits_name, feature) if feature != module.input_name else (module.logits_name,)

    def train(self, progress: Progress, checkpoint: Checkpoint | None = None) -> None:
        """All steps, and the statistics of BatchNorm after them."""
        settings = self.settings
        augmentation = Augmentation(flip=settings.flip, shift=settings.shift)
        how = Training(settings.steps, settings.batch, settings.warmup, settings.mixing, "rate", augmentation)
        groups = [Group(list(self.values.values()), settings.rate)]
        found = None if checkpoint is None else self.ranks.lead(checkpoint.find)
        if found is not None:
            progress.say(f"going on after {found.numbers['step']} of {settings.steps} steps")
        with progress.task("distilling", settings.steps) as task:
            train(self.images, groups, self._loss(), how, self.generator, task, checkpoint, found, ranks=self.ranks)
        self._gather_statistics()

    def _loss(self) -> Callable[[Tensor, Part], Tensor]:
        """The loss of the student as it is, for a part of a batch."""
        settings, temperature = self.settings, self.settings.temperature
        teacher_taps, student_taps = self._taps
        teach = self.teacher.segment([self.teacher.input_name], teacher_taps)
        learn = self.student.segment([self.student.input_name], student_taps)

        def loss_of(pixels: Tensor, part: Part) -> Tensor:
            with torch.no_grad():
                taught = teach({teach.inputs[0]: self._input(self.teacher, pixels)})
            x = {learn.inputs[0]: self._input(self.student, pixels)}
            learned = learn(x, self._tensors(), bodies=self._norms_over(part))
            loss = divergence(part.join(learned[student_taps[0]]), part.join(taught[teacher_taps[0]]), temperature)
            if settings.features and len(student_taps) == len(teacher_taps) == 2:
                features = part.join(learned[student_taps[1]]), part.join(taught[teacher_taps[1]])
                loss = loss + settings.features * likeness_loss(*features)
            return loss

        return loss_of

    def _norms_over(self, part: Part) -> Mapping[str, Body]:
        """What computes BatchNormalization for a part of a batch, by the value it writes."""
        if part.ranks.count == 1:
            return self.norms
        return {name: partial(batch_norm_over, part, norm.epsilon) for name, norm in self.norms.items()}

    def _input(self, module: TorchClassifier, pixels: Tensor) -> Tensor:
        return module.spec.to_input(pixels).to(module.device)

    def _tensors(self) -> dict[str, Tensor]:
        """The student's tensors as they are, what a pruned student lacks left out."""
        return {
            name: torch.where(self.kept[name], value, 0.0) if name in self.kept else value
            for name, value in self.values.items()
        }

    @torch.no_grad()
    def _gather_statistics(self) -> None:
        """Mean and variance of every BatchNorm over all images as they are, in batches of what it was trained on."""
        if not self.norms:
            return
        parts = [part for part in whole_batches(self.images.pixels, self.settings.batch) if len(part) > 1]
        tensors, name = self._tensors(), self.student.input_name
        for part in parts:
            self.student.whole({name: self._input(self.student, part)}, tensors, bodies=self.norms)
        for step in self.student.whole.steps:
            norm = self.norms.get(step.outputs[0])
            if norm is not None:
                for index, value in zip(STATISTICS, norm.gathered(), strict=True):
                    self.values[step.inputs[index]] = value
                    self.places[step.inputs[index]] = [(step.outputs[0], index)]

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of the trained student in torch, with its stored statistics."""
        return self.student.whole({self.student.input_name: inputs}, self._tensors())[self.student.logits_name]

    def edits(self) -> list[Edit]:
        """What to write into the student's graph."""
        tensors = self._tensors()
        return [
            TensorEdit(output, index, tensors[name].cpu().numpy())
            for name, places in self.places.items()
            for output, index in places
        ]

    def layer_accounts(self) -> list[LayerAccount]:
        """How far each layer's weight has moved, relative to what it was."""
        tensors, student = self._tensors(), self.student
        return [
            account_layer(layer.name, student.constant(layer.weight), tensors[layer.weight])
            for layer in student.layers()
        ]

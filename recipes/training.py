"""The one loop that trains a whole network on another's answers: distillation, and quantization-aware training.

Both networks see the same image, augmented and, for a share of the images, blended with another (Beyer et al. 2022), so
that a fixed set of images is never seen twice. Adam, with a linear rise of the rate and then a half cosine to 0, or
a tenth of it after each of given shares of the steps.

Several processes (`ranks`) share out every batch once it is drawn, augmented and mixed, and come to what one comes to,
but for rounding: losses and statistics are those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.errors import MixMixError
from recipes.augment import Augmentation
from recipes.checkpoint import Checkpoint, State
from recipes.devices import pick, send
from recipes.images import ImageSet
from recipes.progress import Task
from recipes.ranks import ALONE, Part, Ranks
from recipes.reconstruct import Group

LOOK_EVERY = 8


@dataclass(frozen=True)
class Training:
    """How long, and what is done to the images."""

    steps: int
    batch: int
    """Images a step."""
    warmup: float
    """Share of the steps over which the rates rise."""
    mixing: float
    """Share of the images that are blended with another of the batch."""
    rate_key: str
    """The setting to lower where training diverges."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    milestones: tuple[float, ...] = ()
    """Shares of the steps after each of which rates are a tenth of what they were; none for a half cosine to 0."""

    def factor(self, step: int) -> float:
        """What the rates are multiplied by at a step: a linear rise to 1 over `warmup`, then down; never exactly 0."""
        progress = step / self.steps
        if progress < self.warmup:
            return (progress + 1e-3) / (self.warmup + 1e-3)
        if self.milestones:
            return 0.1 ** sum(progress >= milestone for milestone in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [N, classes], mean over N (Hinton et al. 2015).

    A single logit is that of the second of two classes, the first one's being 0.
    """
    if student.shape[1] == 1:
        student, teacher = (torch.cat([torch.zeros_like(logits), logits], 1) for logits in (student, teacher))
    log_p = F.log_softmax(student / temperature, 1)
    log_q = F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def train(
    images: ImageSet,
    groups: Sequence[Group],
    loss_of: Callable[[Tensor, Part], Tensor],
    how: Training,
    generator: torch.Generator,
    task: Task,
    checkpoint: Checkpoint | None = None,
    found: State | None = None,
    before: State | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train the tensors of `groups` in place, alike in all `ranks`.

    `loss_of` gives the loss of a whole batch from this process's pixels of it [n, C, H, W] and which part that is.

    `found` is the state that an interrupted run left in `checkpoint`; the result is that of a run that was not
    interrupted. `before` is kept with every state: what the caller needs to come to this point again.

    Raises MixMixError when training diverges.
    """
    tensors = [tensor for group in groups for tensor in group.tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": list(group.tensors), "lr": group.rate} for group in groups])
    order, begun = torch.empty(0, dtype=torch.long), 0
    if found is not None:
        begun = int(found.numbers["step"])
        order = _restore(found, tensors, optimizer, generator)
        task.advance(begun)
    ranks.spread(tensors)
    for step in range(begun, how.steps):
        for entry, group in zip(optimizer.param_groups, groups, strict=True):
            entry["lr"] = group.rate * how.factor(step)
        if len(order) < 2:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[: how.batch], order[how.batch :]
        pixels = how.augmentation(pick(images.pixels, chosen, tensors[0].device), generator)
        part = Part.of(ranks, len(pixels))
        loss = loss_of(part.take(mix_images(pixels, how.mixing, generator)), part)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average([tensor.grad for tensor in tensors if tensor.grad is not None])
        optimizer.step()
        seen = float(loss.detach()) if step % LOOK_EVERY == 0 else 0.0
        if not math.isfinite(seen):
            raise _diverged(how)
        task.advance(1, f"loss {seen:.3f}" if step % LOOK_EVERY == 0 else None)
        if checkpoint is not None and ranks.leads:
            done = step + 1
            now = partial(_state, done, order, tensors, optimizer, generator, before)
            checkpoint.offer(now)
    for tensor in tensors:
        tensor.requires_grad_(False)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise _diverged(how)


def _diverged(how: Training) -> MixMixError:
    return MixMixError(f"training diverged: lower its rate with --set {how.rate_key}=...")


def _moments(tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What Adam remembers, by name."""
    for index, tensor in enumerate(tensors):
        for key, value in optimizer.state[tensor].items():
            yield f"adam.{index}.{key}", value


def _state(
    step: int,
    order: Tensor,
    tensors: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    before: State | None,
) -> State:
    named = {f"trained.{index}": tensor for index, tensor in enumerate(tensors)}
    chance = {"order": order, "generator": generator.get_state()}
    mine = State(named | dict(_moments(tensors, optimizer)) | chance, {"step": step})
    return mine if before is None else State({**before.tensors, **mine.tensors}, {**before.numbers, **mine.numbers})


@torch.no_grad()
def _restore(
    found: State, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> Tensor:
    """Put everything back as it was; the images of this round that are still to come."""
    for index, tensor in enumerate(tensors):
        tensor.copy_(found.tensors[f"trained.{index}"])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = found.tensors.get(f"adam.{index}.{key}")
            if value is not None:  # a tensor that no gradient has reached has none
                optimizer.state[tensor][key] = value if key == "step" else value.to(tensor.device)
    generator.set_state(found.tensors["generator"])
    return found.tensors["order"]


def mix_images(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pixels [N, C, H, W], about `share` of them blended with another of the batch: p x + (1 - p) x', p ~ U(0, 1)."""
    count = len(pixels)
    weight = torch.rand(count, generator=generator)
    weight = torch.where(torch.rand(count, generator=generator) < share, weight, 1.0)
    weight = send(weight.to(pixels.dtype), pixels.device).view(-1, 1, 1, 1)
    partner = torch.randperm(count, generator=generator)
    return weight * pixels + (1 - weight) * pick(pixels, partner, pixels.device)

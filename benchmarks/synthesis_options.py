"""What later papers add to synthesis, each on top of the recipe `small`: one table.

    python benchmarks/synthesis_options.py -o quality/        # about an hour on one core

Images of the target, which is then quantized or pruned on them and judged as `synthesis_quality.py` judges: 128 images,
three seeds, two targets, test images 5,000 to 9,999. Rows:

- the first BatchNorm ten times as heavy (Yin et al. 2020);
- swing convolution: a strided convolution sees its input shifted by a random part of its stride, edges reflected (Jeon
  et al. 2023);
- a generator a batch, trained with its latents instead of the pixels (the same);
- finished images low-pass filtered (SynQ, Kim et al. 2025);
- statistics over 32 images, and over the whole set (DGH), instead of 64, with as many steps a batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import kornia.filters as filters
import torch
import torch.nn.functional as F
from record import Results, chosen_rows, machine
from synthesis_quality import IMAGES, LOW, Cell, classifier, digest, judge, module, spread
from torch import Tensor, nn

from converters.ops.layers import convolution_geometry
from converters.ops.registry import Body
from converters.torch_module import Segment, Step
from recipes.images import ImageSet, from_bytes, to_bytes
from recipes.progress import Silent, Task
from recipes.synth.engine import Batch
from recipes.synth.settings import SynthSettings, load_synth_recipe
from recipes.synth.teachers import Teacher, make_teachers

SEEDS = 3
LATENT, WIDTH = 256, 64


@dataclass(frozen=True)
class Swinging:
    """A segment whose strided convolutions are shifted at random at each call."""

    plain: Segment
    generator: torch.Generator

    def __call__(self, values: Mapping[str, Tensor], transforms: Mapping[str, Callable[[Tensor], Tensor]]) -> object:
        bodies = {step.outputs[0]: self._swing(step) for step in self.plain.steps if step.op == "Conv"}
        return self.plain(values, transforms=transforms, bodies=bodies)

    def _swing(self, step: Step) -> Body:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            strides, _, _ = convolution_geometry(step.attributes, x.shape[2:], weight.shape[2:])
            reach = max(strides) - 1
            if reach:
                height, width = x.shape[2:]
                top, left = (int(torch.randint(2 * reach + 1, (1,), generator=self.generator)) for _ in range(2))
                x = F.pad(x, [reach] * 4, mode="reflect")[:, :, top : top + height, left : left + width]
            return step.operator.body(x, weight, bias)

        return run


class Painter(nn.Module):
    """Latents [N, LATENT] to normalised images [N, C, H, W]: two upsamplings, as in GENIE."""

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.begin = (-(-size[0] // 4), -(-size[1] // 4))
        self.first = nn.Linear(LATENT, WIDTH * self.begin[0] * self.begin[1])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(0.2))
            for _ in range(2)
        )
        self.last = nn.Sequential(nn.Conv2d(WIDTH, channels, 3, padding=1), nn.BatchNorm2d(channels, affine=False))

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).view(len(z), WIDTH, *self.begin)
        for block in self.blocks:
            x = block(F.interpolate(x, scale_factor=2.0))
        return self.last(x)[:, :, : self.size[0], : self.size[1]]


class Painted(Batch):
    """A batch whose pixels come from a generator; as many steps as the recipe has, all at full size."""

    def optimise(self, task: Task) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.generator)))
            painter = Painter(self.channels, self.size)
        latents = torch.randn(len(self.labels), LATENT, generator=self.generator).requires_grad_(True)
        count = self.settings.steps
        optimizer = torch.optim.Adam([{"params": painter.parameters(), "lr": 1e-2}, {"params": [latents], "lr": 1e-2}])
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
        for _ in range(count):
            images = self._clip(painter(latents))
            _, terms, prior = self._terms(images, 1.0)
            for name in terms.keys() - self.weights.first.keys():
                self.weights.register(name, float(terms[name].detach()), self.device)
            loss = self.weights.combine(terms, self.factors) + prior
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            return (self._clip(painter(latents)) * self.std + self.mean).clamp(0, 1)


@dataclass(frozen=True)
class Option:
    """How a row differs from the recipe: settings, teachers, the batch's class, and what is done to finished pixels."""

    overrides: tuple[str, ...] = ()
    teach: Callable[[Teacher, torch.Generator], Teacher] = lambda teacher, _: teacher
    batch: type[Batch] = Batch
    finish: Callable[[Tensor], Tensor] = lambda pixels: pixels

    def settings(self) -> SynthSettings:
        return load_synth_recipe("small", "default", self.overrides, None, {"images": IMAGES})


def first_heavy(teacher: Teacher, _: torch.Generator) -> Teacher:
    return replace(teacher, norms=[teacher.norms[0]] * 9 + teacher.norms)


def swinging(teacher: Teacher, generator: torch.Generator) -> Teacher:
    return replace(teacher, segment=Swinging(teacher.segment, generator))  # type: ignore[arg-type]  # it is called alike


def low_pass(sigma: float, pixels: Tensor) -> Tensor:
    return filters.gaussian_blur2d(pixels, 7, (sigma, sigma))


OPTIONS = {
    "recipe small": Option(),
    "first BatchNorm ten times as heavy": Option(teach=first_heavy),
    "swing convolution": Option(teach=swinging),
    "a generator, 240 steps": Option(batch=Painted),
    "a generator, 960 steps": Option(('stages=[{"scale": 1.0, "steps": 960}]',), batch=Painted),
    "low-pass, sigma 0.5": Option(finish=partial(low_pass, 0.5)),
    "low-pass, sigma 1": Option(finish=partial(low_pass, 1.0)),
    "statistics over 32 images": Option(("batch=32",)),
    "statistics over all 128 images": Option(("batch=128",)),
}


def make(option: Option, target: str, seed: int) -> ImageSet:
    """The set of one row, rounded to 8 bits as a written one is."""
    settings = option.settings()
    generator = torch.Generator().manual_seed(seed)
    teachers, classes = make_teachers([module(target)], settings)
    taught = [option.teach(teacher, generator) for teacher in teachers]
    pixels = []
    with Silent().task("", 1) as task:
        for index, labels in enumerate(torch.arange(settings.images).split(settings.batch)):
            batch = option.batch(taught, settings, module(target).spec.size, labels % classes, 1000 * seed + index)
            pixels.append(option.finish(batch.optimise(task)))
    return ImageSet(from_bytes(to_bytes(torch.cat(pixels))), source="made")


def measure(title: str, cells: list[Cell], seed: int, results: Results) -> list[list[float]]:
    """Of one set a target, made when it is first needed: top-1 and SNR in each cell."""
    option, sets = OPTIONS[title], dict[str, ImageSet]()

    def images(target: str) -> ImageSet:
        if target not in sets:
            sets[target] = make(option, target, seed)
        return sets[target]

    made = option.settings().model_dump_json()
    return [
        results.get(
            (
                "option",
                title,
                target,
                str(how),
                seed,
                digest(made, how.settings().model_dump_json(), torch.__version__),
            ),
            lambda target=target, how=how: judge(  # type: ignore[misc]  # defaults bind the loop's values
                target, lambda output: how.write(classifier(target), images(target), seed, output)
            ),
        )
        for target, how in cells
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="the row of this title, or rows that have it in theirs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results, cells = Results(options.output / "options.jsonl"), list(LOW)
    print(f"{machine()}; {SEEDS} seeds\n")
    print(f"| images | {' | '.join(f'{target} {how}' for target, how in cells)} |\n{'| --- ' * (1 + len(cells))}|")
    for title in chosen_rows(OPTIONS, options.only):
        seeds = [measure(title, cells, seed, results) for seed in range(SEEDS)]
        shown = [", ".join(map(spread, zip(*values, strict=True))) + " dB" for values in zip(*seeds, strict=True)]
        print(f"| {title} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()

"""What images are worth on the embedded zoo: one command a table.

    python benchmarks/synthesis_quality.py quality -o quality/     # noise, leaves, single, paper, default, real images
    python benchmarks/synthesis_quality.py ablation -o quality/    # statistics, labels, mixing, one model and several
    python benchmarks/synthesis_quality.py mixing -o quality/      # other forms of labels and data mixing
    python benchmarks/synthesis_quality.py per-step -o quality/    # models a step, at equal model-steps
    python benchmarks/synthesis_quality.py efforts -o quality/     # --effort fast, default and paper
    python benchmarks/synthesis_quality.py without -o quality/     # a folded target, and one with LayerNorm alone
    python benchmarks/synthesis_quality.py part -o quality/        # a target of which most BatchNorm was folded
    python benchmarks/synthesis_quality.py alike -o quality/       # how well MMD ranks the sets of the other tables

Every set has 128 images. It is quantized on (recipe qdrop, 100 steps a block), or pruned on (recipe obs), and the
written file is judged through onnxruntime on Fashion-MNIST's test images 5,000 to 9,999 (Debian: `apt-get install
dataset-fashion-mnist`); settings were chosen on the first 5,000. Top-1 in per cent and the logits' signal-to-noise
ratio in dB, mean and standard deviation over seeds. What is done is kept in the folder, and a second call goes on from
there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import scipy.stats
import torch
from record import Results, chosen_rows, machine
from train_zoo import DATA, load_split

from converters import folding
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes import zoo
from recipes.compare import compare
from recipes.images import ImageSet, from_bytes, gaussian_noise, load_images, to_bytes
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNING
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE as QUANTIZATION
from recipes.quantize.settings import QuantizeSettings
from recipes.settings import Effort, load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.procedural import dead_leaves
from recipes.synth.settings import load_synth_recipe
from recipes.validate import validate

IMAGES, SIZE = 128, (28, 28)
TARGET = "TARGET"
"""Stands for the model that will be quantized."""


@dataclass(frozen=True)
class Source:
    """Where a set comes from: `models` inverted by a recipe, or one of the fixed kinds."""

    kind: str = "made"
    models: tuple[str, ...] = ()
    recipe: str = "default"
    effort: Effort = "default"
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Widths:
    """Quantization on a set by the recipe `qdrop`, 100 steps a block."""

    bits: int
    act_bits: int | None = None

    def __str__(self) -> str:
        return f"W{self.bits}" + ("" if self.act_bits is None else f"A{self.act_bits}")

    def settings(self) -> QuantizeSettings:
        return load_recipe(QuantizeSettings, QUANTIZATION, "qdrop", "fast")

    def write(self, model: Classifier, images: ImageSet, seed: int, output: Path) -> None:
        quantize(model, images, output, self.settings(), self.bits, self.act_bits, seed=seed)


@dataclass(frozen=True)
class Zeros:
    """Pruning on a set by its default recipe."""

    sparsity: float

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} % zeros"

    def settings(self) -> PruneSettings:
        return load_recipe(PruneSettings, PRUNING, "obs")

    def write(self, model: Classifier, images: ImageSet, seed: int, output: Path) -> None:
        prune(model, images, output, self.settings(), make_goal("unstructured", self.sparsity), seed=seed)


Cell = tuple[str, Widths | Zeros]
"""A target, and how it is compressed."""


@dataclass(frozen=True)
class Table:
    """Rows by title, and columns."""

    rows: dict[str, Source]
    cells: Sequence[Cell]
    seeds: int


def made(*models: str, recipe: str = "default", effort: Effort = "default", **overrides: object) -> Source:
    given = tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items())
    return Source("made", models, recipe, effort, given)


def steps(half: int, full: int) -> list[dict[str, float]]:
    return [{"scale": 0.5, "steps": half}, {"scale": 1.0, "steps": full}]


ALL = zoo.FAMILIES
EQUAL: dict[str, Any] = {"stages": steps(60, 60), "rate": 0.2, "shift": 0.0, "variation": 0.01}
"""What all cells of the ablation have: 120 steps, of which each uses one model."""
LABELS: dict[str, Any] = {"label": 0.1, "weight_rate": 0.0}
FULL: dict[str, Any] = LABELS | {"label": 1.0}
FIXED = {"Gaussian noise": Source("noise"), "dead leaves": Source("leaves")}
REAL = {"real training images": Source("real")}
LOW: Sequence[Cell] = (
    ("inverted", Widths(2)),
    ("residual", Widths(2)),
    ("residual", Widths(2, 4)),
    ("inverted", Zeros(0.7)),
)
TABLES = {
    "quality": Table(
        FIXED
        | {
            "recipe single, the target": made(TARGET, recipe="single"),
            "recipe paper, six models, a tenth of its steps": made(*ALL, recipe="paper", effort="fast"),
            "recipe default, six models": made(*ALL),
            "recipe small (chosen by itself), the target": made(TARGET, recipe="small"),
            "recipe small (chosen by itself), six models": made(*ALL, recipe="small"),
        }
        | REAL,
        (("inverted", Widths(4, 4)), ("inverted", Widths(3)), *LOW),
        seeds=3,
    ),
    "ablation": Table(
        {"dead leaves, where all begin": Source("leaves")}
        | {
            f"{who}: {what}": made(*models, models_per_step=1, **EQUAL, **how)
            for who, models in (("the target", (TARGET,)), ("six models", ALL))
            for what, how in (
                ("statistics", {}),
                ("statistics + labels", LABELS),
                ("statistics + labels + data mixing", LABELS | {"mixing": "label"}),
            )
        }
        | {
            "one other model: statistics": made("OTHER", models_per_step=1, **EQUAL),
            "the five other models: statistics": made("OTHERS", models_per_step=1, **EQUAL),
        }
        | REAL,
        LOW,
        seeds=5,
    ),
    "mixing": Table(
        {
            f"six models: statistics + {what}": made(*ALL, models_per_step=1, **EQUAL, **FULL | how)
            for what, how in (
                ("labels of weight 1", {}),
                ("labels of weight 1 + data mixing", {"mixing": "label"}),
                ("labels of weight 1 + data mixing, statistics of the mixed images", {"mixing": "all"}),
            )
        },
        LOW,
        seeds=5,
    ),
    "per-step": Table(
        {
            f"{count} of 6 models a step, {360 // count} steps": made(
                *ALL, models_per_step=count, **EQUAL | {"stages": steps(180 // count, 180 // count)}
            )
            for count in (1, 2, 3, 6)
        },
        LOW,
        seeds=3,
    ),
    "efforts": Table(
        {
            f"recipe small, the target, --effort {effort}": made(TARGET, recipe="small", effort=effort)
            for effort in get_args(Effort)
        },
        (("inverted", Widths(4, 4)), ("inverted", Widths(2)), ("inverted", Widths(2, 4)), ("inverted", Zeros(0.7))),
        seeds=3,
    ),
    "without": Table(
        FIXED
        | {
            "labels alone, the target": made(TARGET, recipe="small-labels", unevenness=0.0),
            "recipe labels, the target": made(TARGET, recipe="labels"),
            "recipe small-labels (chosen by itself), the target": made(TARGET, recipe="small-labels"),
            "recipe small, six models": made(*ALL, recipe="small"),
            "recipe small, the target and those that are no twin": made(TARGET, "OTHERS", recipe="small"),
            "statistics of those that are no twin": made("OTHERS", recipe="small"),
        }
        | REAL,
        (
            ("inverted_folded", Widths(2)),
            ("inverted_folded", Widths(2, 4)),
            ("inverted_folded", Zeros(0.7)),
            ("attention", Widths(3)),
            ("attention", Widths(2)),
        ),
        seeds=3,
    ),
    "part": Table(
        {
            "statistics alone": made(TARGET, recipe="small", unevenness=0.0),
            "recipe small (chosen by itself)": made(TARGET, recipe="small"),
            "recipe small-labels": made(TARGET, recipe="small-labels"),
        }
        | REAL,
        [(f"inverted, {kept} of 20 kept", how) for kept in (1, 6) for how in (Widths(2), Widths(2, 4), Zeros(0.7))],
        seeds=3,
    ),
}
MADE = tempfile.TemporaryDirectory()
"""Files of targets that are not in the zoo."""


@cache
def classifier(name: str) -> Classifier:
    """That of the zoo or, of `NAME, K of N kept`, with BatchNorm folded behind the first K."""
    family, _, kept = name.partition(", ")
    path = zoo.model_path(family)
    return load_classifier(part_folded(path, int(kept.split()[0])) if kept else path)


def part_folded(path: Path, kept: int) -> Path:
    model = ir.load(path)
    held = [node for node in model.graph if node.op_type == "BatchNormalization"][:kept]
    for node in held:
        node.op_type = "Held"
    folding.fold_affine(model)
    for node in held:
        node.op_type = "BatchNormalization"
    output = Path(MADE.name) / f"{path.stem}_{kept}.onnx"
    ir.save(model, output)
    return output


@cache
def module(name: str) -> TorchClassifier:
    return to_torch(classifier(name))


@cache
def judging() -> ImageSet:
    images, labels = load_split(DATA, "t10k")
    return ImageSet(from_bytes(images[5000:, :, :, None]), torch.from_numpy(labels[5000:].astype(np.int64)), "real")


@cache
def training(count: int, seed: int) -> ImageSet:
    """Real training images, others for each seed."""
    images, _ = load_split(DATA, "train")
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return ImageSet(from_bytes(images[chosen, :, :, None]), source="real")


def image_set(title: str, source: Source, target: str, seed: int, folder: Path) -> ImageSet:
    """The set, made or found in `folder`."""
    if source.kind == "noise":
        return gaussian_noise(IMAGES, 1, SIZE, seed)
    if source.kind == "leaves":
        pixels = dead_leaves(IMAGES, 1, SIZE, torch.Generator().manual_seed(seed))
        return ImageSet(from_bytes(to_bytes(pixels)), source=title)
    if source.kind == "real":
        return training(IMAGES, seed)
    stands = {
        TARGET: [target],
        "OTHERS": [name for name in ALL if name != target.removesuffix("_folded")],
        "OTHER": ["residual" if target == "inverted" else "inverted"],
    }
    names = [name for model in source.models for name in stands.get(model, [model])]
    for_target = f" for {target}" if stands.keys() & set(source.models) else ""
    directory = folder / "sets" / f"{title}{for_target}, {seed}".replace("/", "-")
    settings = load_synth_recipe(source.recipe, source.effort, source.overrides, None, {"images": IMAGES})
    synthesize([module(name) for name in names], directory, settings, recipe=source.recipe, seed=seed, resume=True)
    return load_images(directory)


def fingerprint(source: Source, *used: Widths | Zeros) -> str:
    """Of what decides a figure: another recipe, quantizer or torch is another figure."""
    made = load_synth_recipe(source.recipe, source.effort, source.overrides, None, {"images": IMAGES})
    settings = [how.settings().model_dump_json() for how in used]
    return digest(repr(source), made.model_dump_json(), *settings, torch.__version__)


def digest(*parts: str) -> str:
    """A short name for what decides a figure."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def judge(target: str, write: Callable[[Path], object]) -> list[float]:
    """Top-1 in per cent, and logit signal-to-noise ratio in dB, of the file that `write` makes of the target."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "smaller.onnx"
        write(output)
        (judged,) = validate(classifier(target), [load_classifier(output)], judging(), threads=1).candidates
    return [100 * (judged.top1 or 0.0), judged.snr]


def float_accuracy(target: str) -> float:
    """Top-1 in per cent of the target as it is."""
    return 100 * (validate(classifier(target), [classifier(target)], judging()).reference.top1 or 0.0)


def alikeness(target: str, images: ImageSet) -> list[float]:
    """MMD^2 to 256 real images in the target's features, and the distance of statistics from the stored ones."""
    found = compare(module(target), images, training(256, 99), permutations=1)
    return [found.mmd2, found.to_stored[0] if found.to_stored else found.distance]


def measure_table(name: str, table: Table, only: str, targets: Sequence[str], folder: Path, results: Results) -> None:
    columns = [(target, how) for target, how in table.cells if not targets or target in targets]
    heads = [f"{target} {how}" for target, how in columns]
    floats = {target: float_accuracy(target) for target in dict.fromkeys(target for target, _ in columns)}
    print(f"float: {', '.join(f'{target} {value:.2f} %' for target, value in floats.items())}; {table.seeds} seeds\n")
    print(f"| images | {' | '.join(heads)} |\n{'| --- ' * (1 + len(heads))}|")
    for title, source in chosen_rows(table.rows, only).items():
        cells = []
        for cell in columns:
            values = [measure_cell(name, title, source, cell, seed, folder, results) for seed in range(table.seeds)]
            cells.append(", ".join(spread(column) for column in zip(*values, strict=True)) + " dB")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def measure_cell(
    name: str, title: str, source: Source, cell: Cell, seed: int, folder: Path, results: Results
) -> list[float]:
    """Top-1 and signal-to-noise ratio of one written file; beside them the likeness of its images, by the way."""
    target, how = cell
    images = cache(partial(image_set, title, source, target, seed, folder))

    def measure() -> list[float]:
        return judge(target, partial(how.write, classifier(target), images(), seed))

    if module(target).batchnorms():
        results.get(("alike", name, title, target, seed, fingerprint(source)), lambda: alikeness(target, images()))
    return results.get((name, title, target, str(how), seed, fingerprint(source, how)), measure)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def rank(results: Results) -> None:
    """Spearman's rank correlation over all sets measured, of the two distances with what the sets gave."""
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for name, table in TABLES.items():
        for (title, source), (target, how), seed in itertools.product(
            table.rows.items(), table.cells, range(table.seeds)
        ):
            known = results.found.get(("alike", name, title, target, seed, fingerprint(source)))
            value = results.found.get((name, title, target, str(how), seed, fingerprint(source, how)))
            if known is not None and value is not None:
                rows.setdefault((target, str(how)), []).append([*known, *value])
    print("| target | sets | MMD^2 and top-1 | MMD^2 and SNR | statistics and top-1 | statistics and SNR |")
    print("| --- " * 6 + "|")
    for (target, shown), found in sorted(rows.items()):
        if len(found) > 5:
            mmd2, distance, top1, snr = zip(*found, strict=True)
            pairs = ((mmd2, top1), (mmd2, snr), (distance, top1), (distance, snr))
            ranks = " | ".join(f"{scipy.stats.spearmanr(a, b).statistic:.2f}" for a, b in pairs)
            print(f"| {target} {shown} | {len(found)} | {ranks} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "alike"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="the row of this title, or rows that have it in theirs")
    parser.add_argument("--targets", nargs="+", default=(), help="only their columns")
    options = parser.parse_args()
    known = {target for table in TABLES.values() for target, _ in table.cells}
    if unknown := sorted(set(options.targets) - known):
        parser.error(f"no table has {', '.join(unknown)}: the targets are {', '.join(sorted(known))}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "results.jsonl")
    print(f"{machine()}\n")
    if options.table == "alike":
        rank(results)
    else:
        measure_table(options.table, TABLES[options.table], options.only, options.targets, options.output, results)


if __name__ == "__main__":
    main()

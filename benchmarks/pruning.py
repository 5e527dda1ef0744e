"""What pruning leaves of the embedded zoo's accuracy, by method and by images.

    python benchmarks/pruning.py -o pruning/               # about 30 minutes on one core
    python benchmarks/pruning.py -o pruning/ --only stage  # only rows with this in their title

Every set has 128 images; the written file is judged through onnxruntime on Fashion-MNIST's test images 5,000 to 9,999
(Debian: `apt-get install dataset-fashion-mnist`). Learning rates were chosen at 80 % and 2:4 on other image sets
(real ones, seeds 0 to 3). Top-1 in per cent and the logits' signal-to-noise ratio in dB, mean and standard deviation
over three seeds. What is done is kept in the folder, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from record import Results, chosen_rows, machine
from synthesis_quality import (
    ALL,
    TARGET,
    Source,
    classifier,
    digest,
    float_accuracy,
    image_set,
    judge,
    made,
    spread,
)

from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE, PruneSettings
from recipes.settings import load_recipe

SEEDS = (10, 11, 12)
GOALS: tuple[tuple[str, float | None], ...] = (
    ("unstructured", 0.5),
    ("unstructured", 0.7),
    ("unstructured", 0.8),
    ("unstructured", 0.9),
    ("2:4", None),
)


@dataclass(frozen=True)
class Row:
    """How weights are removed and the rest trained, and on which images."""

    method: str
    images: Source
    allocation: str = "sensitivity"
    trained: bool = True


REAL = Source("real")
ROWS = {
    "one-shot, uniform, real images": Row("one-shot", REAL, "uniform"),
    "one-shot, real images": Row("one-shot", REAL),
    "two-stage, uniform, real images": Row("two-stage", REAL, "uniform"),
    "one-stage, real images": Row("one-stage", REAL),
    "two-stage, real images": Row("two-stage", REAL),
    "obs, not trained, real images": Row("obs", REAL, trained=False),
    "obs (default), real images": Row("obs", REAL),
    "obs, Gaussian noise": Row("obs", Source("noise")),
    "obs, images from the target": Row("obs", made(TARGET, recipe="small")),
    "obs, images from the target, --effort fast": Row("obs", made(TARGET, recipe="small", effort="fast")),
    "obs, images from the target, --effort paper": Row("obs", made(TARGET, recipe="small", effort="paper")),
    "obs, images from six models": Row("obs", made(*ALL, recipe="small")),
}
# The target has no statistics, and says of its images what their class is and how even its channels are to be.
STATISTICS_GONE = {
    "obs (default), real images": Row("obs", REAL),
    "obs, Gaussian noise": Row("obs", Source("noise")),
    "obs, images from the target (recipe small-labels)": Row("obs", made(TARGET, recipe="small-labels")),
    "obs, images from one other model": Row("obs", made("residual", recipe="small")),
    "obs, images from five other models": Row(
        "obs", made(*(name for name in ALL if name != "inverted"), recipe="small")
    ),
    "obs, images from six models": Row("obs", made(*ALL, recipe="small")),
}
TABLES = {"inverted": ROWS, "residual": ROWS, "inverted_folded": STATISTICS_GONE, "attention": STATISTICS_GONE}


def measure(target: str, pattern: str, sparsity: float | None, row: Row, seed: int, folder: Path) -> list[float]:
    """Top-1 in per cent, and the logits' signal-to-noise ratio in dB."""
    settings = _settings(row)
    name = str(row.images.models or row.images.kind) + f" {row.images.effort}" * (row.images.effort != "default")
    images = image_set(name, row.images, target, seed, folder)
    goal = make_goal(pattern, sparsity)
    return judge(target, lambda output: prune(classifier(target), images, output, settings, goal, seed=seed))


def _settings(row: Row) -> PruneSettings:
    untrained = {} if row.trained else {"mask_steps": 0, "steps": 0}
    return load_recipe(PruneSettings, PACKAGE, row.method).model_copy(
        update={"allocation": row.allocation, **untrained}
    )


def _fingerprint(row: Row) -> str:
    """Of what decides a row's figures."""
    return digest(repr(row.images), _settings(row).model_dump_json(), torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="the row of this title, or rows that have it in theirs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "pruning.jsonl")
    print(machine())
    wanted = chosen_rows({title: row for rows in TABLES.values() for title, row in rows.items()}, options.only)
    for target, rows in TABLES.items():
        heads = [pattern if sparsity is None else f"{100 * sparsity:g} %" for pattern, sparsity in GOALS]
        print(f"\n| {target}, float {float_accuracy(target):.2f} % | {' | '.join(heads)} |")
        print("| --- " * (1 + len(GOALS)) + "|")
        for title, row in rows.items():
            if title not in wanted:
                continue
            cells = []
            for goal in GOALS:
                values = [
                    results.get(
                        (title, target, *goal, seed, _fingerprint(row)),
                        partial(measure, target, *goal, row, seed, options.output),
                    )
                    for seed in SEEDS
                ]
                cells.append(", ".join(spread(column) for column in zip(*values, strict=True)) + " dB")
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

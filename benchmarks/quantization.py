"""What quantization leaves of the embedded zoo's accuracy, by method, by bits and by images.

    python benchmarks/quantization.py methods -o quantized/     # about two hours on one core
    python benchmarks/quantization.py images -o quantized/      # real ones against made ones, default method

Every set has 128 images; the written file is judged through onnxruntime on Fashion-MNIST's test images 5,000 to 9,999
(Debian: `apt-get install dataset-fashion-mnist`), true labels. Top-1 in per cent, mean and standard deviation over
three seeds (another set of images, other chance), and the means of all cells, of the logits' signal-to-noise ratio
too. What is done is kept in the folder, and a second call goes on.
"""

from __future__ import annotations

import argparse
import statistics
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

from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe

SEEDS = (20, 21, 22)
TARGETS = ("inverted", "residual", "attention", "dense", "shuffle", "excite", "plain", "inverted_folded")
WIDTHS: tuple[tuple[int, int | None], ...] = ((4, None), (3, None), (2, None), (4, 4), (3, 3), (2, 4))


@dataclass(frozen=True)
class Row:
    """A method, and the images that it works on."""

    method: str
    images: Source
    overrides: tuple[str, ...] = ()


REAL = Source("real")
TABLES = {
    "methods": {
        "nearest": Row("nearest", REAL),
        "AdaRound": Row("adaround", REAL),
        "BRECQ": Row("brecq", REAL),
        "default": Row("qdrop", REAL),
        "default, logit_share=0": Row("qdrop", REAL, ("logit_share=0",)),
    },
    "images": {
        "real images": Row("qdrop", REAL),
        "made from six models": Row("qdrop", made(*ALL, recipe="small")),
        "made from the target": Row("qdrop", made(TARGET, recipe="small")),
    },
}


def settings_of(row: Row) -> QuantizeSettings:
    return load_recipe(QuantizeSettings, PACKAGE, row.method, overrides=row.overrides)


def measure(target: str, bits: int, act_bits: int | None, row: Row, seed: int, folder: Path) -> list[float]:
    """Top-1 in per cent, and the logits' signal-to-noise ratio in dB."""
    images = image_set(str(row.images.models or row.images.kind), row.images, target, seed, folder)
    settings = settings_of(row)
    return judge(
        target, lambda output: quantize(classifier(target), images, output, settings, bits, act_bits, seed=seed)
    )


def _fingerprint(row: Row) -> str:
    return digest(repr(row.images), settings_of(row).model_dump_json(), torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="only these (for several processes)")
    parser.add_argument("--only", default="", help="the row of this title, or rows that have it in theirs")
    parser.add_argument("--widths", nargs="+", help="only these columns, such as W2A4")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="these, where three are too few to tell")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "quantization.jsonl")
    print(machine())
    widths = {f"W{bits}" + ("" if act is None else f"A{act}"): (bits, act) for bits, act in WIDTHS}
    heads = [head for head in widths if head in (options.widths or widths)]
    for target in options.targets:
        print(f"\n| {target}, float {float_accuracy(target):.2f} % | {' | '.join(heads)} | mean | mean SNR |")
        print("| --- " * (3 + len(heads)) + "|")
        for title, row in chosen_rows(TABLES[options.table], options.only).items():
            cells, means = [], []
            for width in map(widths.__getitem__, heads):
                values = [
                    results.get(
                        (row.method, str(row.images), target, *width, seed, _fingerprint(row)),
                        partial(measure, target, *width, row, seed, options.output),
                    )
                    for seed in options.seeds
                ]
                top1, snr = zip(*values, strict=True)
                cells.append(spread(top1))
                means.append((statistics.mean(top1), statistics.mean(snr)))
            top1, snr = map(statistics.mean, zip(*means, strict=True))
            print(f"| {title} | {' | '.join(cells)} | {top1:.2f} | {snr:.1f} dB |", flush=True)


if __name__ == "__main__":
    main()

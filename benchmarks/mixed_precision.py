"""Accuracy against size: the same bits for all layers, and bits by layer within the same budget.

    python benchmarks/mixed_precision.py -o mixed/        # about 20 minutes on one core

Each uniform row has B bits for all weights (`--bits B --set extra_share=0`); the mixed row below it is
`--mixed bits=B`. The rows of `--bits B` are the default, which adds a tenth of what lies between B and 8 bits. Those of
`--mixed size=...` have the bytes of the row above. 128 real images a set, judged as in `quantization.py`: top-1 in per
cent and the logits' signal-to-noise ratio in dB, mean and standard deviation over three seeds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from synthesis_quality import Results, classifier, digest, float_accuracy, judge, spread, training

from converters.targets import choose_target
from recipes.account import Compression
from recipes.quantize.budget import Budget
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe

SEEDS = (30, 31, 32)
TARGETS = ("inverted", "residual")
UNIFORM = (2, 3, 4)
MIXED = (2.25, 2.5, 3.5)


def measure(target: str, bits: int | Budget, seed: int, container: str, settings: QuantizeSettings) -> list[float]:
    """Top-1 in per cent, SNR in dB, average bits a weight, and bytes of the file."""
    made: list[Compression] = []

    def write(output: Path) -> None:
        chosen = choose_target("portable", container)
        made.append(quantize(classifier(target), training(128, seed), output, settings, bits, target=chosen, seed=seed))

    top1, snr = judge(target, write)
    (result,) = made
    weights = sum(layer.weights for layer in result.layers)
    average = sum(layer.weights * (layer.bits or 32) for layer in result.layers) / weights
    return [top1, snr, average, result.size_after]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "mixed.jsonl")
    default = load_recipe(QuantizeSettings, PACKAGE, "qdrop")
    same_bits = default.model_copy(update={"extra_share": 0.0})
    print(f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}")

    def rows(
        target: str, bits: int | Budget, container: str, settings: QuantizeSettings = default
    ) -> Sequence[list[float]]:
        mark = digest(settings.model_dump_json(), torch.__version__)
        return [
            results.get(
                (target, str(bits), container, seed, mark), partial(measure, target, bits, seed, container, settings)
            )
            for seed in SEEDS
        ]

    for target in TARGETS:
        print(f"\n| {target}, float {float_accuracy(target):.2f} % | average bits | kB | top-1 | SNR |")
        print("| --- " * 5 + "|")
        for bits in UNIFORM:
            show(f"{bits} bits for all", rows(target, bits, "int4", same_bits))
            if bits > min(UNIFORM):
                show(f"`--mixed bits={bits}`", rows(target, Budget("bits", bits), "int4"))
            show(f"`--bits {bits}`", rows(target, bits, "int4"))
        for amount in MIXED:
            show(f"`--mixed bits={amount:g}`", rows(target, Budget("bits", amount), "int4"))
        for bits, container in ((4, "int4"), (2, "int2")):
            show(f"`--bits {bits}`, stored in {container}", found := rows(target, bits, container))
            budget = Budget("size", statistics.mean(row[3] for row in found))
            show(f"`--mixed size=` the same, stored in {container}", rows(target, budget, container))


def show(title: str, found: Sequence[list[float]]) -> None:
    top1, snr, average, size = zip(*found, strict=True)
    print(
        f"| {title} | {statistics.mean(average):.2f} | {statistics.mean(size) / 1e3:.1f} | {spread(top1)}"
        f" | {spread(snr)} dB |",
        flush=True,
    )


if __name__ == "__main__":
    main()

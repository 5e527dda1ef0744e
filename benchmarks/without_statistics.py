"""What images are worth when the model has no BatchNorm statistics: the embedded folded net at W2 and W2A4.

    python benchmarks/without_statistics.py --seeds 3            # about half an hour on one core

Gaussian noise, dead leaves as they are, dead leaves shaped by the folded net's labels (recipe `labels`, what `synth`
does with such a model), images inverted from the same net with BatchNorm kept (what a zoo could give at best), and real
training images. 128 images, 100 steps a block (`--effort fast`), top-1 on 1,000 test images by onnxruntime and the
logits' signal-to-noise ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import torch

from converters.load import load_classifier
from converters.torch_module import to_torch
from recipes import zoo
from recipes.images import ImageSet, from_bytes, gaussian_noise, load_images, to_bytes
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.procedural import dead_leaves
from recipes.synth.settings import load_synth_recipe
from recipes.validate import validate

TARGET, KEPT = "inverted_folded", "inverted"
IMAGES, SIZE = 128, (28, 28)
WIDTHS = ((2, None), (2, 4))


def leaves(seed: int) -> ImageSet:
    pixels = dead_leaves(IMAGES, 1, SIZE, torch.Generator().manual_seed(seed))
    return ImageSet(from_bytes(to_bytes(pixels)))


def made(name: str, recipe: str, seed: int, folder: Path) -> ImageSet:
    """Images from one embedded model."""
    settings = load_synth_recipe(recipe, "default", (), None, {"images": IMAGES})
    directory = folder / f"{recipe}-{seed}"
    synthesize([to_torch(load_classifier(zoo.model_path(name)))], directory, settings, recipe=recipe, seed=seed)
    return load_images(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    reference, judging = load_classifier(zoo.model_path(TARGET)), load_images(zoo.test_images_path())
    settings = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast")
    print(f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}\n")
    heads = [f"W{bits}" + ("" if act is None else f"A{act}") for bits, act in WIDTHS]
    print(f"| images | {' | '.join(f'{head}, seeds 0 to {options.seeds - 1} | mean, SNR' for head in heads)} |")
    print("| --- " * (1 + 2 * len(WIDTHS)) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {
            "noise": lambda seed: gaussian_noise(IMAGES, 1, SIZE, seed),
            "dead leaves": leaves,
            "dead leaves shaped by labels": lambda seed: made(TARGET, "labels", seed, folder),
            "inverted from the kept file": lambda seed: made(KEPT, "default", seed, folder),
            "real": lambda _seed: load_images(zoo.calibration_images_path(), IMAGES),
        }
        for title, images in sets.items():
            cells, of_seed = [], [images(seed) for seed in range(options.seeds)]
            for bits, act_bits in WIDTHS:
                top1, snr = [], []
                for seed, given in enumerate(of_seed):
                    output = folder / "quantized.onnx"
                    quantize(reference, given, output, settings, bits, act_bits, seed=seed, overwrite=True)
                    (judged,) = validate(reference, [load_classifier(output)], judging).candidates
                    top1.append(100 * (judged.top1 or 0.0))
                    snr.append(judged.snr)
                count = options.seeds
                cells.append(", ".join(f"{value:.1f}" for value in top1))
                cells.append(f"{sum(top1) / count:.1f} %, {sum(snr) / count:.1f} dB")
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

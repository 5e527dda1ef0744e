"""What a quantized file's latency is by target: onnxruntime's CPU provider, one thread, one image of 224x224.

    python benchmarks/integer_speed.py -o speed/          # about 10 minutes on one core

torchvision architectures with random weights and BatchNorm statistics of noise (latency does not depend on the
numbers), rounded to nearest. Float and quantized model run in turn, the median of each; layers in integers are counted
in the graph that onnxruntime runs after its optimisations.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from exporting import export_folded
from record import machine

from converters.load import load_classifier
from converters.runtime import Session
from converters.targets import choose_target
from recipes.images import gaussian_noise
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe

MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0")
FILES = (("portable", 4, None), ("portable", 8, 8), ("ort-cpu", 8, 8), ("ort-cpu", 4, 8))
ROUNDS = 15


def export(name: str, path: Path) -> Path:
    if path.exists():
        return path
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 224, 224))
    export_folded(model.eval(), torch.zeros(1, 3, 224, 224), path)
    return path


def in_turn(paths: list[Path], x: np.ndarray) -> list[float]:
    """Median milliseconds of each file, all run in turn."""
    sessions = [Session(path, threads=1) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    for round_ in range(ROUNDS + 1):
        for session, kept in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(x)
            if round_:  # the first is warm-up
                kept.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(kept) for kept in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    heads = [f"{target} W{bits}" + ("" if act is None else f"A{act}") for target, bits, act in FILES]
    print(f"| model | float | {' | '.join(heads)} |\n{'| --- ' * (2 + len(heads))}|")
    settings = load_recipe(QuantizeSettings, PACKAGE, "nearest", overrides=["extra_share=0"])
    for name in options.models:
        source = load_classifier(export(name, options.output / f"{name}.onnx"))
        paths, counted = [source.path], []
        for target, bits, act_bits in FILES:
            path = options.output / f"{name}.{target}.w{bits}{'' if act_bits is None else f'a{act_bits}'}.onnx"
            chosen = choose_target(target, None, act_bits)
            made = gaussian_noise(4, 3, (224, 224), 0)
            result = quantize(source, made, path, settings, bits, act_bits, chosen, overwrite=True)
            paths.append(path)
            counted.append(f"{0 if result.fusion is None else result.fusion.counted}/{len(result.layers)}")
        plain, *others = in_turn(paths, source.spec.to_input(gaussian_noise(1, 3, (224, 224), 1).pixels).numpy())
        sizes = [path.stat().st_size / 1e6 for path in paths]
        cells = [
            f"{ms:.1f} ms ({ms / plain:.2f}), {size:.1f} MB, {count}"
            for ms, size, count in zip(others, sizes[1:], counted, strict=True)
        ]
        print(f"| {name} | {plain:.1f} ms, {sizes[0]:.1f} MB | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

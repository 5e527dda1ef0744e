"""Files of other frameworks' exporters: Keras by tf2onnx, and PaddlePaddle by paddle2onnx.

    OMP_NUM_THREADS=1 python benchmarks/other_exporters.py -o others/            # about an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/other_exporters.py -o others/ --only keras/MobileNet

Their architectures with random weights, BatchNorm's statistics those of four images of noise, each framework in a
virtual environment in the folder. `difference` is the largest one of the torch module's logits from onnxruntime's,
relative to the largest logit, on Gaussian noise; W8A8 is for `ort-cpu`, rounded to nearest on four images: layers that
run in integers of all layers, the logits' signal-to-noise ratio, and median latency against float, run in turn, one
thread and one image. What is exported is kept in the folder.
"""

from __future__ import annotations

import argparse
import subprocess
import warnings
from pathlib import Path

import numpy as np
import torch
from environments import interpreter, last_line
from record import machine

from converters.conversion import relative_difference, to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.targets import choose_target
from recipes.blocks import find_blocks
from recipes.images import gaussian_noise
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.validate import decibels

PACKAGES = {
    "keras": ("tensorflow-cpu", "tf2onnx", "protobuf<7"),
    "paddle": ("paddlepaddle", "paddle2onnx", "packaging"),
}
NAMES = {
    "keras": (
        "MobileNet", "MobileNetV2", "MobileNetV3Small", "ResNet50", "ResNet50V2", "DenseNet121", "NASNetMobile",
        "Xception", "InceptionV3", "VGG16", "EfficientNetB0", "ConvNeXtTiny",
    ),
    "paddle": (
        "resnet18", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_0",
        "densenet121", "resnext50_32x4d",
    ),
}  # fmt: skip
ROUNDS = 20
EXPORT = {
    "keras": """
import sys
import keras, numpy as np, tensorflow as tf
keras.utils.set_random_seed(0)
model = getattr(keras.applications, sys.argv[1])(weights=None)
for layer in model.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.momentum = 0.0
model(np.random.default_rng(0).uniform(0, 2, (4, *model.input_shape[1:])).astype("float32"), training=True)
model.export(sys.argv[2], format="onnx", verbose=False)
""",
    "paddle": """
import sys
import paddle
paddle.seed(0)
model = getattr(paddle.vision.models, sys.argv[1])(pretrained=False)
for layer in model.sublayers():
    if type(layer).__name__.startswith("BatchNorm"):
        layer._momentum = 0.0
model(paddle.randn([4, 3, 224, 224]))
model.eval()
spec = paddle.static.InputSpec([None, 3, 224, 224], "float32", "image")
paddle.onnx.export(model, sys.argv[2].removesuffix(".onnx"), input_spec=[spec], opset_version=15)
""",
}


def exported(framework: str, name: str, folder: Path) -> Path:
    """The file, made or found. Raises RuntimeError with the exporter's reason where there is none."""
    path = folder / f"{framework}-{name}.onnx"
    if not path.exists():
        python = interpreter(framework, PACKAGES[framework], folder)
        run = subprocess.run([python, "-c", EXPORT[framework], name, path], capture_output=True, text=True, cwd=folder)
        if run.returncode or not path.exists():
            raise RuntimeError(last_line(run.stderr))
    return path


def latency_ratio(written: Path, reference: Path, x: np.ndarray) -> float:
    sessions = [Session(path, threads=1) for path in (written, reference)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for session, found in zip(sessions, times, strict=True):
            found.append(session.latency(x, seconds=0.1, least=3))
    return float(np.median(times[0]) / np.median(times[1]))


def cells(path: Path, folder: Path) -> list[str]:
    """Columns behind the name. Raises MixMixError where something is refused."""
    classifier = load_classifier(path)
    module = to_torch(classifier)
    noise = gaussian_noise(4, classifier.spec.channel_count, classifier.spec.size, 0)
    x = classifier.spec.to_input(noise.pixels)
    expected = classifier.session(optimise=False, threads=1).run(x.numpy())[0]
    with torch.no_grad():
        logits = module(x).numpy()
    largest = max(len(block.layers) for block in find_blocks(module))
    settings = load_recipe(QuantizeSettings, PACKAGE, "nearest", overrides=["extra_share=0", "range_steps=20"])
    output, target = folder / "written.onnx", choose_target("ort-cpu", None, 8)
    result = quantize(classifier, noise, output, settings, 8, 8, target, overwrite=True)
    actual = load_classifier(output).session(threads=1).run(x.numpy())[0]
    assert result.fusion is not None
    return [
        f"{relative_difference(logits, expected):.0e}",
        f"{len(module.batchnorms())}",
        f"{largest}",
        f"{result.fusion.counted}/{result.fusion.layers}",
        f"{decibels(expected.astype(np.float64), actual.astype(np.float64)):.1f}",
        f"{latency_ratio(output, path, x[:1].numpy()):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only models whose framework/name has one of these in it"
    )
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    heads = ["model", "difference", "BN", "largest block", "in integers", "SNR dB", "ms / ms of float"]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for framework, names in NAMES.items():
        for name in names:
            title = f"{framework}/{name}"
            if not any(part in title for part in options.only):
                continue
            try:
                found = cells(exported(framework, name, folder), folder)
            except (MixMixError, RuntimeError) as error:
                found = [str(error)[:200].replace("|", "/")]
            print(f"| {title} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()

"""Which classifiers convert: architecture by exporter, each held against onnxruntime.

    pip install timm
    python benchmarks/conversion_matrix.py -o matrix.md                  # everything; about an hour on two cores
    python benchmarks/conversion_matrix.py -o matrix.md --only resnet18 --only vit

Weights are random (seed 0). `difference` is the largest one of the logits from onnxruntime's, relative to the largest
logit; `gradient` says whether it reaches every pixel channel of the input; `batch 8` is the difference on eight images
at once; `weights` counts the layers whose weight is found in the file bit for bit, of all layers; `BN` counts
BatchNorm layers with statistics that are left; seconds are load and conversion, the check against onnxruntime included.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torchvision
from exporting import export_folded, export_kept
from torch import nn

from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.torch_module import relative_difference, to_torch

TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet1_0
    mobilenet_v2 mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0
    squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2
""".split()  # noqa: SIM905
TIMM = """
    cait_xxs24_224 coat_tiny convmixer_768_32 crossvit_tiny_240 deit_tiny_patch16_224 dla34 dm_nfnet_f0 dpn68
    edgenext_small efficientformer_l1 efficientvit_b0 fastvit_t8 ghostnet_100 gmlp_s16_224 hardcorenas_a hrnet_w18_small
    levit_128s mixer_s32_224 mobilevit_s mobilevitv2_050 nasnetalarge nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0
    regnetx_002
    repvgg_a0 res2net50_26w_4s resmlp_12_224 resnest14d rexnet_100 seresnet50 sknet18 tinynet_a tf_efficientnet_b0
    visformer_tiny volo_d1_224 xcit_nano_12_p16_224
""".split()  # noqa: SIM905
EXPORTERS: dict[str, Callable[[nn.Module, torch.Tensor, Path], None]] = {
    "legacy, kept": export_kept,
    "default": export_folded,
}


@dataclass(frozen=True)
class Row:
    """One file."""

    model: str
    exporter: str
    opset: str
    difference: str
    gradient: str
    batch: str
    weights: str
    norms: str
    seconds: str


def models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Name, constructor and input side."""
    for name in TORCHVISION:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        side = 299 if name == "inception_v3" else 256 if name == "swin_v2_t" else 224
        yield f"torchvision {name}", lambda name=name, extra=extra: torchvision.models.get_model(name, **extra), side
    for name in TIMM:
        if not timm.is_model(name):
            print(f"timm has no {name}")
            continue
        side = timm.get_pretrained_cfg(name).input_size[1]
        yield f"timm {name}", lambda name=name: timm.create_model(name), side


def judge(name: str, exporter: str, path: Path, side: int) -> Row:
    """Load, convert and compare one exported file."""
    opset = str(next(o.version for o in onnx.load(path, load_external_data=False).opset_import if not o.domain))
    started = time.perf_counter()
    try:
        classifier = load_classifier(path)
        module = to_torch(classifier)
    except MixMixError as error:
        return Row(name, exporter, opset, str(error).replace(str(path), "").strip(": ")[:120], *["-"] * 5)
    seconds = time.perf_counter() - started
    session = Session(path)
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))

    def difference(part: torch.Tensor) -> float:
        with torch.no_grad():
            return relative_difference(module(part).numpy(), np.asarray(session.run(part.numpy())[0]))

    image = x[:1].clone().requires_grad_(True)
    module(image).square().sum().backward()
    reaches = image.grad is not None and bool(
        image.grad.isfinite().all() and (image.grad.abs().amax((0, 2, 3)) > 0).all()
    )
    layers = module.layers()
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    found = sum(
        layer.weight in stored and np.array_equal(stored[layer.weight], module.constant(layer.weight))
        for layer in layers
    )
    norms = str(len(module.batchnorms()))
    return Row(
        name, exporter, opset, f"{difference(x[:1]):.0e}", "yes" if reaches else "no", f"{difference(x):.0e}",
        f"{found}/{len(layers)}", norms, f"{seconds:.1f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="only models whose name holds this; repeatable")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, timm, onnx, onnxruntime))
    columns = ["model", "exporter", "opset", "difference", "gradient", "batch 8", "weights", "BN", "seconds"]
    head = f"{platform.machine()}, {os.cpu_count()} cores, {versions}\n\n| {' | '.join(columns)} |\n"
    head += "| --- " * len(columns) + "|\n"
    for name, build, side in models():
        if options.only and not any(part in name for part in options.only):
            continue
        torch.manual_seed(0)
        model = build().eval()
        for exporter, export in EXPORTERS.items():
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "model.onnx"
                try:
                    export(model, torch.zeros(2, 3, side, side), path)
                    row = judge(name, exporter, path, side)
                except Exception as error:  # the exporter's own failures are rows too
                    row = Row(name, exporter, "-", f"not exported: {type(error).__name__}", *["-"] * 5)
            rows.append(row)
            print(" | ".join(vars(row).values()), flush=True)
            lines = "".join("| " + " | ".join(vars(r).values()) + " |\n" for r in rows)
            options.output.write_text(head + lines)


if __name__ == "__main__":
    main()

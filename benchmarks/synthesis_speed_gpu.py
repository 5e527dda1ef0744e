"""Synthesis on a GPU: 1,024 images at 224x224 from ResNet-50, the paper's 2,500 + 2,500 steps, beside a plain loop.

    python benchmarks/synthesis_speed_gpu.py                                                # the whole table, one GPU
    python benchmarks/synthesis_speed_gpu.py --device cpu --images 8 --steps 2 --side 64    # to see that it runs

The plain loop is that of `synthesis_speed.py`: eager, float32, hooks on every BatchNorm2d, 8 images at a time. It makes
a sixteenth of the images in a tenth of the steps, which is enough to know its rate. Rates are image-steps a second over
both stages; the share of the device's peak is of the multiplications of the network's forward and backward pass alone
(two operations each, `torch.utils.flop_counter`), at the peak of the precision that they are computed in. Weights are
random: they decide nothing of the time.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torchvision
from synthesis_speed import exported, our_loop, plain_loop, statistics_alone
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from converters.input_spec import InputSpec
from recipes.devices import choose_device
from recipes.synth.settings import Stage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCHES = (64, 128, 256)
PEAKS = {  # dense, in 10^12 operations a second: float32 on tensor cores (TF32), as convolutions are, and bfloat16
    "H100": {"float32": 494, "bfloat16": 989},
    "H200": {"float32": 494, "bfloat16": 989},
    "A100": {"float32": 156, "bfloat16": 312},
}
"""From the makers' data sheets (SXM)."""


def operations(model: nn.Module, side: int, device: torch.device) -> int:
    """Of one image-step: forward, and back to the image."""
    x = torch.zeros(1, 3, side, side, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def peak(device: torch.device, precision: str) -> float | None:
    """Operations a second, where the device is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * values[precision] for part, values in PEAKS.items() if part in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2500, help="of each stage: half resolution, and full")
    parser.add_argument("--side", type=int, default=224)
    options = parser.parse_args()
    device, images, steps, side = choose_device(options.device), options.images, options.steps, options.side
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval().requires_grad_(False)
    module = exported(model, InputSpec(size=(side, side), mean=MEAN, std=STD, source="metadata")).to(device)
    model.to(device)
    sides = (side // 2, side)
    count = sum(operations(model, each, device) for each in sides) / len(sides)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, n = 1; ResNet-50 at {side}x{side} and half of it, on average", end=" ")
    print(f"{count / 1e9:.2f} billion operations an image-step\n")
    print("| loop | images, steps | seconds | image-steps/s | ratio | share of peak |")
    print("| --- " * 6 + "|")

    def show(title: str, made: int, each: int, seconds: float, plain: float | None, precision: str) -> float:
        rate, most = 2 * made * each / seconds, peak(device, precision)
        share = "-" if most is None else f"{rate * count / most:.2f}"
        ratio = "1" if plain is None else f"{rate / plain:.1f}"
        print(f"| {title} | {made}, {each} + {each} | {seconds:.1f} | {rate:.0f} | {ratio} | {share} |", flush=True)
        return rate

    few, short = max(8, images // 16), max(1, steps // 10)
    plain_loop(model, 8, (3, side, side), 2)  # what the first call has to set up is not its fault
    seconds = sum(plain_loop(model, few, (3, each, each), short) for each in sides)
    plain = show("plain, batch 8, float32", few, short, seconds, None, "float32")
    for precision, batch in itertools.product(("float32", "bfloat16"), BATCHES):
        stages = [Stage(scale=0.5, steps=steps), Stage(scale=1, steps=steps)]
        how = statistics_alone(batch, stages, precision=precision)
        our_loop(module, min(batch, images), statistics_alone(batch, [Stage(scale=1, steps=2)], precision=precision))
        seconds = our_loop(module, images, how)
        show(f"MixMix, batch {batch}, {precision}", images, steps, seconds, plain, precision)


if __name__ == "__main__":
    main()

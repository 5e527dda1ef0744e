"""Steps of block reconstruction a second, against a plain loop: one residual block of ResNet-18, batch 32, W4A4.

    python benchmarks/reconstruction_speed.py          # about 5 minutes on one core

The plain loop is written here on native torch modules, independently of the product: AdaRound's rectified sigmoid on
two convolutions, learned activation steps, Adam, images as torch lays them out. Both train the same block with random
weights on the same random input, in turn; what is compared are steps. Both do the same work in each, and the default
also what its loss asks of the logits, whose slopes are taken before. On processors that multiply matrices in bfloat16
(AMX), the product's are timed in it too; elsewhere it is far slower than float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from exporting import export_folded
from record import machine
from torch import Tensor, nn

from converters.conversion import to_torch
from converters.load import load_classifier
from converters.targets import PORTABLE
from converters.writeback import prepare_for_quantization
from recipes.blocks import find_blocks
from recipes.devices import choose_precision, multiplies_bfloat16
from recipes.memory import keep_freed_memory
from recipes.quantize.quantizers import QuantizedActivation, QuantizedWeight
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.reconstruct import Loop, Stretch, block_error, reconstruct
from recipes.settings import load_recipe
from recipes.slopes import Slopes

IMAGES, BATCH, STEPS, ROUNDS = 64, 32, 12, 5
PRECISIONS = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
PRODUCT = [(recipe, precision) for recipe in ("brecq", "qdrop") for precision in PRECISIONS]
STAGES = {"layer1": (64, 56), "layer2": (128, 28), "layer3": (256, 14)}
"""Channels and side of the input of each stage's second block."""


class PlainConv(nn.Module):
    """A convolution whose weight is rounded up or down as `alpha` says."""

    def __init__(self, conv: nn.Conv2d, bits: int = 4) -> None:
        super().__init__()
        self.conv, self.high = conv, 2 ** (bits - 1) - 1
        self.scale = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / self.high
        self.floor = torch.floor(conv.weight.detach() / self.scale)
        rest = conv.weight.detach() / self.scale - self.floor
        self.alpha = nn.Parameter(-torch.log(1.2 / (rest + 0.1) - 1))

    def soft(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.clamp(self.floor + self.soft(), -self.high - 1, self.high) * self.scale
        return F.conv2d(x, weight, self.conv.bias, padding=1)


class PlainActivation(nn.Module):
    """Learned step, unsigned."""

    def __init__(self, step: float, bits: int = 4) -> None:
        super().__init__()
        self.step, self.high = nn.Parameter(torch.tensor(step)), 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        scaled = x / self.step
        rounded = scaled + (scaled.round() - scaled).detach()
        return torch.clamp(rounded, 0, self.high) * self.step


class PlainBlock(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.first, self.second = (PlainConv(conv) for conv in convs)
        self.before, self.between = PlainActivation(0.1), PlainActivation(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return F.relu(self.second(self.between(F.relu(self.first(x)))) + x)


def plain_loop(channels: int, x: Tensor, y: Tensor) -> Callable[[], None]:
    block = PlainBlock(channels)
    groups: list[dict[str, Any]] = [
        {"params": [block.first.alpha, block.second.alpha], "lr": 1e-3},
        {"params": [block.before.step, block.between.step]},
    ]
    optimizer = torch.optim.Adam(groups)

    def steps() -> None:
        for step in range(STEPS):
            chosen = torch.randperm(len(x))[:BATCH]
            loss = (block(x[chosen]) - y[chosen]).pow(2).sum(1).mean()
            beta = 20 - 18 * step / STEPS
            for conv in (block.first, block.second):
                loss = loss + 0.01 * (1 - (2 * conv.soft() - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def product_loop(path: Path, channels: int, x: Tensor, settings: QuantizeSettings) -> Callable[[], None]:
    module = to_torch(prepare_for_quantization(load_classifier(path), PORTABLE, 4, 4), check=False)
    square = [(channels, channels, 3, 3)] * 2
    block = next(b for b in find_blocks(module, settings.max_chain) if [layer.shape for layer in b.layers] == square)
    segment = module.segment(block.inputs, [block.output])
    x = x.contiguous(memory_format=torch.channels_last)
    given = {block.inputs[0]: x}
    y = segment(given)[block.output].detach()
    objective = Slopes(module, settings).objective(Stretch(block, segment, given, given, y, {}), STEPS)
    weights: dict[str, QuantizedWeight] = {}
    values: dict[str, QuantizedActivation] = {}
    for layer in block.layers:
        weights[layer.weight] = QuantizedWeight(module.constant(layer.weight), layer.axis, 4, settings)
        values[layer.input] = QuantizedActivation(x.flatten()[:10000].abs(), 4, settings)

    plain = block_error(segment, given, objective, weights, values, settings.batch)

    def steps() -> None:
        for weight in weights.values():
            weight.learn()
        generator = torch.Generator().manual_seed(0)
        precision = choose_precision(settings.precision, block.layers, module.device)
        loop = Loop(STEPS, BATCH, settings.input_drop, precision=precision)
        reconstruct(segment, given, given, objective, weights, values, loop, plain, generator)

    return steps


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{machine()}, {ROUNDS} rounds of {STEPS} steps\n")
    heads = [f"`{recipe}`, {precision}" for recipe, precision in PRODUCT]
    print(f"| block | plain, steps/s | {' | '.join(heads)} |\n{'| --- ' * (2 + len(heads))}|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.onnx"
        torch.manual_seed(0)
        export_folded(torchvision.models.resnet18(weights=None).eval(), torch.zeros(1, 3, 224, 224), path)
        for name, (channels, side) in STAGES.items():
            x = torch.rand(IMAGES, channels, side, side)
            loops = [plain_loop(channels, x, torch.rand_like(x))]
            for recipe, precision in PRODUCT:
                settings = load_recipe(QuantizeSettings, PACKAGE, recipe, overrides=[f"precision={precision}"])
                loops.append(product_loop(path, channels, x, settings))
            times: list[list[float]] = [[] for _ in loops]
            for round_ in range(ROUNDS + 1):
                for loop, kept in zip(loops, times, strict=True):
                    started = time.perf_counter()
                    loop()
                    if round_:
                        kept.append(time.perf_counter() - started)
            plain, *others = (STEPS / statistics.median(kept) for kept in times)
            cells = " | ".join(f"{other:.2f} ({other / plain:.2f})" for other in others)
            print(f"| {name}.1, {channels} channels, {side}x{side} | {plain:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

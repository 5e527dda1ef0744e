"""Train the embedded zoo on Fashion-MNIST and export it (Debian: `apt-get install dataset-fashion-mnist`).

    python benchmarks/train_zoo.py -o recipes/embedded            # all seven families, then the images beside them
    python benchmarks/train_zoo.py -o recipes/embedded inverted   # one family; the others are left as they are

Each family is trained for 10 epochs (AdamW, one-cycle rate, flips and shifts by up to 2 pixels), judged on the 10,000
test images, and written as `NAME.onnx` with BatchNorm kept; `inverted` is also written as `inverted_folded.onnx` by
the default exporter, which folds BatchNorm into the convolutions. One core takes about 10 to 20 minutes a family.
The data set is (c) 2017 Zalando SE, MIT licence.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from exporting import export_folded
from numpy.typing import NDArray
from record import machine
from torch import Tensor, nn
from zoo_models import FAMILIES, WITHOUT_BATCHNORM

from converters.export import export_kept

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]
FOLDED = "inverted"
ALL = FAMILIES | WITHOUT_BATCHNORM
RATES = {"attention": 3e-3}
"""Largest learning rate of the schedule, where the usual one is too large."""
TEST_IMAGES, CALIBRATION_IMAGES = 1000, 256


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file (big-endian: two zero bytes, type, rank, sizes, data) of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(data: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [N, 28, 28] and labels [N] of `train` or `t10k`."""
    return read_idx(data / f"{split}-images-idx3-ubyte.gz"), read_idx(data / f"{split}-labels-idx1-ubyte.gz")


def normalise(images: NDArray[np.uint8]) -> Tensor:
    return (torch.from_numpy(images.copy()).float()[:, None] / 255 - MEAN) / STD


def augment(batch: Tensor) -> Tensor:
    """Flip half of the images and shift each by up to 2 pixels (the background is black)."""
    n, _, height, width = batch.shape
    batch = torch.where(torch.rand(n, 1, 1, 1) < 0.5, batch.flip(3), batch)
    padded = nn.functional.pad(batch, (2, 2, 2, 2), value=-MEAN / STD)
    rows = torch.randint(0, 5, (n, 1)) + torch.arange(height)
    columns = torch.randint(0, 5, (n, 1)) + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, batch: int = 128) -> None:
    model.to(memory_format=torch.channels_last).train()
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps * epochs, pct_start=0.2)
    for epoch in range(epochs):
        order, start = torch.randperm(len(images)), time.perf_counter()
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            logits = model(augment(images[chosen]).contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return hits / len(images)


def describe(model: onnx.ModelProto, name: str, top1: float) -> onnx.ModelProto:
    """Add the input spec and the measured accuracy to the metadata; drop the exporter's stack traces."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    facts = {
        "mixmix.input.size": "[28, 28]",
        "mixmix.input.channels": "gray",
        "mixmix.input.layout": "NCHW",
        "mixmix.input.scale": "1",
        "mixmix.input.mean": f"[{MEAN}]",
        "mixmix.input.std": f"[{STD}]",
        "mixmix.input.labels": "fashion-mnist",
        "mixmix.zoo.family": name,
        "mixmix.zoo.test_top1": f"{top1:.4f}",
    }
    onnx.helper.set_model_props(model, facts)
    return model


def export(model: nn.Module, name: str, top1: float, directory: Path) -> None:
    """Write the model with BatchNorm kept and, for one family, as the default exporter does: folded."""
    model.eval().to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, 1, 28, 28)
    kept = directory / f"{name}.onnx"
    export_kept(model, example, kept)
    onnx.save(describe(onnx.load(kept), name, top1), kept)
    if name == FOLDED:
        folded = directory / f"{name}_folded.onnx"
        export_folded(model, example, folded)
        onnx.save(describe(onnx.load(folded), name, top1), folded)


def write_images(data: Path, directory: Path) -> None:
    """The first 1,000 test images (to judge by) and the first 256 training images (the real-data bound)."""
    for split, count, name in (("t10k", TEST_IMAGES, "test"), ("train", CALIBRATION_IMAGES, "calibration")):
        images, labels = load_split(data, split)
        np.savez_compressed(directory / f"{name}.npz", images=images[:count, :, :, None], labels=labels[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *ALL], help="which to train (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, seed {options.seed}")
    train_images, train_labels = load_split(options.data, "train")
    test_images, test_labels = load_split(options.data, "t10k")
    tensors = [normalise(train_images), torch.from_numpy(train_labels).long()]
    judges = [normalise(test_images), torch.from_numpy(test_labels).long()]
    for name in options.families or ALL:
        torch.manual_seed(options.seed)
        model = ALL[name]()
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train(model, tensors[0], tensors[1], options.epochs, RATES.get(name, 8e-3))
        top1 = accuracy(model, judges[0], judges[1])
        print(f"{name}: test accuracy {top1:.4f} (n = {len(test_images):,})", flush=True)
        export(model, name, top1, options.output)
    write_images(options.data, options.output)


if __name__ == "__main__":
    main()

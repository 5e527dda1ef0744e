"""What it takes to load: seconds for ResNet-50, and peak memory for models of one and of several gigabytes.

    python benchmarks/loading.py                    # needs about 8 GB of memory and of disk

Each measurement is a process of its own that loads a file to a checked torch module. Memory is the process's peak
resident set, Python and libraries included; files over 2 GB keep their weights in external data.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from exporting import export_folded
from onnx import TensorProto, helper
from record import machine

WIDTH = 8192
LAYER_BYTES = WIDTH * WIDTH * 4


def write_large(path: Path, layers: int, *, external: bool) -> None:
    """A classifier of 64x64 gray pixels with `layers` square Gemms of a quarter of a gigabyte each."""
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("Gemm", ["flat", "in"], ["v0"])]
    generator = np.random.default_rng(0)
    shapes = {"in": (64 * 64, WIDTH), **{f"w{i}": (WIDTH, WIDTH) for i in range(layers)}, "out": (WIDTH, 10)}
    for index in range(layers):
        nodes.append(helper.make_node("Gemm", [f"v{index}", f"w{index}"], [f"r{index}"]))
        nodes.append(helper.make_node("Relu", [f"r{index}"], [f"v{index + 1}"]))
    nodes.append(helper.make_node("Gemm", [f"v{layers}", "out"], ["logits"]))
    tensors, offset, data = [], 0, path.with_suffix(".data")
    with data.open("wb") as file:
        for name, shape in shapes.items():
            content = (generator.standard_normal(shape, np.float32) * (2 / shape[0]) ** 0.5).tobytes()
            tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            if external:
                file.write(content)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", offset), ("length", len(content))):
                    tensor.external_data.add(key=key, value=str(value))
                offset += len(content)
            else:
                tensor.raw_data = content
            tensors.append(tensor)
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def load(path: Path) -> None:
    """Load and convert in this process; print seconds and peak bytes."""
    from converters.conversion import to_torch
    from converters.load import load_classifier

    started = time.perf_counter()
    to_torch(load_classifier(path))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(time.perf_counter() - started, int(status["VmHWM"].split()[0]) * 1024)  # ru_maxrss has the parent's too


def measure(name: str, path: Path) -> None:
    size = sum(part.stat().st_size for part in (path, path.with_suffix(".data")) if part.exists())
    done = subprocess.run([sys.executable, __file__, str(path)], check=True, capture_output=True, text=True)
    seconds, peak = map(float, done.stdout.split())
    print(f"| {name} | {size / 1e9:.2f} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.1f} |", flush=True)


def main() -> None:
    print(f"{machine()}\n")
    print("| file | GB | seconds | peak GB | peak / file |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_folded(torchvision.models.resnet50().eval(), torch.zeros(2, 3, 224, 224), path)
        measure("ResNet-50", path)
        for layers, external in ((4, False), (4, True), (12, True)):
            write_large(path, layers, external=external)
            measure(f"{layers + 2} Gemms, {'external data' if external else 'one file'}", path)


if __name__ == "__main__":
    load(Path(sys.argv[1])) if len(sys.argv) > 1 else main()

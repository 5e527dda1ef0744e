"""Whether a written file computes what was computed: every quantized tensor, in steps of its own quantizer.

    python benchmarks/exactness.py -o exact/                     # hours on one core
    python benchmarks/exactness.py -o exact/ --only resnet vgg   # architectures that have this in their name

The architectures of the conversion matrix with its random weights, at 64x64 or, where one takes no other, at its own
size, rounded to nearest. The written file is read back as a torch module; each of its quantized activations, computed
from onnxruntime's values of all others, is compared with onnxruntime's own (optimisations off), in steps: 0 is equal,
and one is what float rounding at a boundary between two steps may do. With optimisations on, the logits are compared:
noise as a share of the noise of quantization itself.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import light_models
import numpy as np
import onnx_ir as ir
import torch
from conversion_matrix import LITE0, NOT_EXPORTED, bring_alive, models, write_seeded
from exporting import export_legacy
from record import machine
from torch import nn

from converters import graphs
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.runtime import Session
from converters.targets import choose_target
from recipes.images import gaussian_noise
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe

FILES = (("portable", 4, None), ("portable", 4, 4), ("ort-cpu", 8, 8), ("ort-cpu", 4, 8), ("tensorrt", 8, 8))
SIZE, IMAGES = 64, 6


def sources(only: Sequence[str], folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, file and input side of every architecture of the conversion matrix whose name has one of `only` in it."""
    for name in light_models.NAMES:
        if any(part in name for part in only):
            path = folder / f"{name}.onnx"
            write_seeded(name, path)
            yield f"onnx {name}", path, 224
    for name, build, native in models():
        if any(part in name for part in only):
            path = folder / f"{name.replace(' ', '-')}.onnx"
            for side in (native,) if name == LITE0 else (SIZE, native):
                try:
                    export(build, side, path, alive=name != LITE0)
                except Exception as error:  # of the network at this size, or the exporter's, which is a row too
                    failure = error
                    continue
                yield name, path, side
                break
            else:
                print(f"| {name} | {NOT_EXPORTED}: {type(failure).__name__} |", flush=True)


def export(build: Callable[[], nn.Module], side: int, path: Path, *, alive: bool) -> None:
    """Write the network, with the matrix's random weights where it is to be brought alive."""
    torch.manual_seed(0)
    model = build()
    if alive:
        bring_alive(model, side)
    export_legacy(model.eval(), torch.zeros(1, 3, side, side), path)


def steps_apart(written: Classifier, x: torch.Tensor) -> tuple[float, float, int]:
    """Largest difference of any quantized activation in steps, share of elements that differ, and tensors."""
    scales = {
        str(node.outputs[0].name): float(graphs.to_numpy(scale))
        for node in written.original.graph
        if node.op_type == "DequantizeLinear" and graphs.constant_behind(node.inputs[0]) is None
        for scale in node.inputs[1:2]
        if scale is not None
    }
    if not scales:
        return 0.0, 0.0, 0
    probe = written.original.clone()
    values = {str(v.name): v for node in probe.graph for v in node.outputs}
    probe.graph.outputs[:] = [values[name] for name in scales]
    for name in scales:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
    session = Session(probe, optimise=False, threads=1)
    there = dict(zip(session.output_names, session.run(x.numpy()), strict=True))
    module = to_torch(written, check=False)  # the check is of logits, into which a single step carries on
    given = {module.input_name: x} | {name: torch.from_numpy(value) for name, value in there.items()}
    apart = []
    for name, scale in scales.items():  # from onnxruntime's values of all others, so that no difference is carried on
        others = [other for other in given if other != name]
        here = module.segment(others, [name])({other: given[other] for other in others})[name]
        apart.append(np.abs(here.numpy() - there[name]) / scale)
    differing = sum(float((a > 0.5).sum()) for a in apart) / sum(a.size for a in apart)
    return max(float(a.max()) for a in apart), differing, len(scales)


def fused_noise(source: Path, written: Path, x: np.ndarray) -> float:
    """What optimisations change in the logits, as a share of what quantization changes."""
    reference = Session(source, threads=1).run(x)[0].astype(np.float64)
    plain, fused = (Session(written, optimise=how, threads=1).run(x)[0].astype(np.float64) for how in (False, True))
    return float(np.square(fused - plain).sum() / max(np.square(plain - reference).sum(), 1e-30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="only models whose name has one of these in it")
    parser.add_argument("--targets", nargs="+", default=["portable", "ort-cpu", "tensorrt"])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{machine()}; cells: most steps apart, share of elements, noise of optimisations, in integers\n")
    files = [file for file in FILES if file[0] in options.targets]
    heads = [f"{target} W{bits}" + ("" if act is None else f"A{act}") for target, bits, act in files]
    print(f"| model | {' | '.join(heads)} |\n{'| --- ' * (1 + len(heads))}|")
    settings = load_recipe(QuantizeSettings, PACKAGE, "nearest", overrides=["extra_share=0", "range_steps=20"])
    for name, exported, side in sources(options.only, options.output):
        try:
            source = load_classifier(exported)
        except MixMixError as error:
            print(f"| {name} | **{str(error)[:90]}** |", flush=True)
            exported.unlink()
            continue
        images = gaussian_noise(IMAGES, 3, (side, side), 0)
        x = source.spec.to_input(gaussian_noise(source.fixed_batch or 3, 3, (side, side), 1).pixels)
        cells = []
        for target, bits, act_bits in files:
            path = exported.with_suffix(f".{target}.w{bits}{'' if act_bits is None else f'a{act_bits}'}.onnx")
            try:
                chosen = choose_target(target, None, act_bits)
                result = quantize(source, images, path, settings, bits, act_bits, chosen, overwrite=True)
                most, share, _ = steps_apart(load_classifier(path), x)
                fused = fused_noise(source.path, path, x.numpy())
            except MixMixError as error:
                cells.append(f"**{str(error)[:90]}**")
                continue
            finally:
                path.unlink(missing_ok=True)
            counted = "" if result.fusion is None else f", {result.fusion.counted}/{result.fusion.layers}"
            cells.append(f"{most:.0f}, {share:.0e}, {fused:.0e}{counted}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        exported.unlink()


if __name__ == "__main__":
    main()

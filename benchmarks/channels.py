"""Whole channels: MixMix by images, MixMix beside Torch-Pruning, and what distillation gives pruned students back.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/channels.py -o channels/              # half an hour
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/channels.py -o channels/ --seeds 1 --tables images peer

Every set has 128 images. All files are judged alike, by onnxruntime: top-1 and the logits' signal-to-noise ratio
against float on Fashion-MNIST's test images 5,000 to 9,999 (Debian: `apt-get install dataset-fashion-mnist`), and
median latency with one thread and one image, float and candidate run in turn in one process. Multiplications and
parameters are those that `mixmix inspect` counts.

Torch-Pruning gets a virtual environment in the folder, which sees this one's torch, and a process of its own
(`run-peer`): the torch module that the embedded file was exported from, its weights by name, the same logits as
onnxruntime to 1e-4. Its pruning ratio is the smallest that comes to the budget. Files and figures are kept in the
folder, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import zoo_models
from peer_quantizers import judged, kept
from peer_subjects import embedded, logits, session
from record import machine
from synthesis_quality import ALL, TARGET, Source, classifier, digest, image_set, judging, made
from torch import nn
from train_zoo import describe

from converters.classifier import Classifier
from converters.export import export_kept
from converters.load import load_classifier
from recipes import zoo
from recipes.distill.engine import distill
from recipes.distill.settings import PACKAGE as DISTILL
from recipes.distill.settings import DistillSettings
from recipes.inspect import inspect_model
from recipes.prune.engine import prune
from recipes.prune.goal import Goal, make_goal
from recipes.prune.settings import PACKAGE, PruneSettings
from recipes.settings import load_recipe
from recipes.synth.settings import load_synth_recipe

SEEDS = (10, 11, 12)
TARGETS = ("residual", "inverted")
SHARES = (0.7, 0.5)
TIMES = (0.8, 0.7)
REAL = Source("real")
IMAGES = {
    "real": REAL,
    "made from six models": made(*ALL, recipe="small"),
    "made from the target": made(TARGET, recipe="small"),
    "Gaussian noise": Source("noise"),
}
PEER = "torch-pruning"
PEERS: dict[str, dict[str, int]] = {
    "group L2, each layer alike": {"p": 2, "everywhere": 0},
    "group L2, each layer alike, multiples of 8": {"p": 2, "everywhere": 0, "round_to": 8},
    "group L1, each layer alike": {"p": 1, "everywhere": 0},
    "group L2, global": {"p": 2, "everywhere": 1},
}
MOST = 0.9
"""Largest share of a layer's channels that goes, by MixMix's default and here."""
HALVINGS = 10
STEPS = 500
TABLES = ("images", "time", "peer", "sparse")
SPARSE = (("residual", 0.9), ("inverted", 0.8))
SPEED = ("ms / ms of float", "convolutions in blocked layout %")
COLUMNS = {"top1": 2, "snr": 2, "macs": 1, "parameters": 1, "kb": 0, "latency": 2, "blocked": 0}
"""Digits of the figures."""
Facts = dict[str, Any]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def written(folder: Path, title: str, parts: Sequence[str], write: Callable[[Path], object]) -> Path:
    """The file of that title and of what decides it, made or found."""
    path = folder / f"{title}-{digest(*parts, torch.__version__)}.onnx"
    if not path.exists():
        log(title)
        write(path)
    return path


def facts_of(path: Path, target: str) -> Facts:
    """What onnxruntime and `inspect` say of a file, measured or found beside it."""

    def measure() -> Facts:
        found = inspect_model(load_classifier(path))
        return judged(path, embedded(target)) | {
            "macs": found.macs,
            "parameters": found.parameters,
            "sparsity": 100 * found.sparsity,
        }

    facts = kept(path.with_suffix(".judged.json"), measure)
    if "error" in facts:
        raise RuntimeError(f"{path.name} {facts['error']}")
    return facts


def shares(path: Path, target: str) -> Facts:
    """The facts, with multiplications and parameters in per cent of the float model's, and latency relative to it."""
    facts, whole = facts_of(path, target), inspect_model(classifier(target))
    return facts | {
        "macs": 100 * facts["macs"] / whole.macs,
        "parameters": 100 * facts["parameters"] / whole.parameters,
        "latency": facts["ms"] / facts["float_ms"],
        "blocked": 100 * blocked(path),
    }


def blocked(path: Path) -> float:
    """Share of the convolutions that onnxruntime runs in its blocked layout, the fast one of its CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    found = [node.domain == "com.microsoft.nchwc" for node in nodes if node.op_type in ("Conv", "FusedConv")]
    return sum(found) / len(found)


def pruned(target: str, title: str, goal: Goal, source: Source, seed: int, folder: Path) -> Path:
    """A file of `mixmix prune`, by the default recipe."""
    settings = load_recipe(PruneSettings, PACKAGE, "obs")
    synth = load_synth_recipe(source.recipe, source.effort, source.overrides, None, {"images": 128})

    def write(path: Path) -> None:
        images = image_set(str(source.models or source.kind), source, target, seed, folder)
        prune(classifier(target), images, path, settings, goal, seed=seed)

    name = f"{target}-{goal.pattern.name}-{round(100 * goal.sparsity)}-{title}-{seed}".replace(" ", "_")
    parts = [repr(source), settings.model_dump_json(), synth.model_dump_json()]
    return written(folder, name, parts, write)


def distilled(target: str, student: Path, seed: int, folder: Path, *overrides: str) -> Path:
    """The student after steps on the real images, taught by the float model."""
    settings = load_recipe(DistillSettings, DISTILL, "default", overrides=[f"steps={STEPS}", *overrides])

    def write(path: Path) -> None:
        images = image_set("real", REAL, target, seed, folder)
        distill(classifier(target), load_classifier(student), images, path, settings, seed=seed)

    return written(folder, f"{student.stem}.distilled", [settings.model_dump_json(), str(seed)], write)


def peer_python(folder: Path) -> tuple[Path, str]:
    """The Python that has Torch-Pruning, installed where it is not yet, and the version."""
    home = folder / "env"
    python = home / "bin" / "python"
    if not (home / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", PEER], check=True)
        (home / "done").touch()
    (site,) = home.glob("lib/python*/site-packages")
    (found,) = importlib.metadata.distributions(name=PEER, path=[str(site)])
    return python, found.version


def peer_pruned(target: str, share: float, title: str, folder: Path) -> Path:
    python, version = peer_python(folder)

    def write(path: Path) -> None:
        subprocess.run([python, __file__, "run-peer", target, str(share), title, path], check=True)

    name = f"{target}-peer-{round(100 * share)}-{title}".replace(" ", "_")
    return written(folder, name, [version, repr(PEERS[title]), str(MOST), str(HALVINGS)], write)


def native(target: str) -> nn.Module:
    """The embedded file as the torch module that it was exported from. Raises RuntimeError where logits differ."""
    path = zoo.model_path(target)
    module = getattr(zoo_models, target)().eval()
    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:  # equal tensors are stored once
        if node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
    own = module.state_dict()
    module.load_state_dict({name: tensors.get(name, own[name]) for name in own})
    lacking = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    inputs = classifier(target).spec.to_input(judging().pixels[:256])
    with torch.no_grad():
        difference = float(np.abs(module(inputs).numpy() - logits(session(path), inputs.numpy())).max())
    if lacking or difference > 1e-4:
        raise RuntimeError(f"{target}: not the exported module: {lacking} not found, logits differ by {difference:g}")
    log(f"{target}: torch module and onnxruntime differ by {difference:.1e}")
    return module


def macs_of(model: Classifier) -> int:
    """Multiplications for one image."""
    macs = inspect_model(model).macs
    assert macs is not None
    return macs


def run_peer(target: str, share: float, how: dict[str, int], output: Path) -> None:
    """Torch-Pruning's documented recipe, at the smallest ratio that leaves at most `share` of the multiplications."""
    import torch_pruning

    module, example = native(target), torch.zeros(2, 1, 28, 28)
    budget = share * macs_of(classifier(target))

    def narrow(ratio: float, path: Path) -> bool:
        smaller = copy.deepcopy(module)
        torch_pruning.pruner.BasePruner(
            smaller,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=how["p"]),
            global_pruning=bool(how["everywhere"]),
            round_to=how.get("round_to"),
            pruning_ratio=ratio,
            max_pruning_ratio=MOST,
            ignored_layers=[m for m in smaller.modules() if isinstance(m, nn.Linear)],
        ).step()
        export_kept(smaller.eval(), example, path)
        onnx.save(describe(onnx.load(path), target, 0.0), path)
        return macs_of(load_classifier(path)) <= budget

    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / "tried.onnx"
        low, high = 0.0, MOST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if narrow(middle, tried) else (middle, high)
        if not narrow(high, tried):
            raise RuntimeError(f"{target}: no ratio comes to {share:g} of the multiplications")
        output.write_bytes(tried.read_bytes())
    log(f"{output.stem}: ratio {high:.4f}")


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there is one."""
    found = f"{statistics.mean(values):.{digits}f}"
    return found if len(values) == 1 else f"{found} ± {statistics.stdev(values):.{digits}f}"


def head(*titles: str) -> None:
    print(f"\n| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|", flush=True)


def print_images(seeds: Sequence[int], folder: Path) -> None:
    print(f"\nMixMix, `prune --pattern channel --macs`, recipe obs, {len(seeds)} seed(s):")
    head("model", "MACs asked", "images", "top-1 %", "SNR dB", "MACs %", "parameters %", "kB", *SPEED)
    for target in TARGETS:
        whole = shares(float_copy(target, folder), target)
        size = f"{whole['kb']:.0f} | {whole['ms']:.3f} ms / {whole['float_ms']:.3f} | {whole['blocked']:.0f}"
        print(f"| {target} | 1 | float | {whole['top1']:.2f} | – | 100 | 100 | {size} |")
        for share in SHARES:
            for title, source in IMAGES.items():
                goal = make_goal("channel", None, share)
                found = [shares(pruned(target, title, goal, source, seed, folder), target) for seed in seeds]
                cells = [cell([facts[key] for facts in found], digits) for key, digits in COLUMNS.items()]
                print(f"| {target} | {share} | {title} | {' | '.join(cells)} |", flush=True)


def print_time(seeds: Sequence[int], folder: Path) -> None:
    print(f"\nMixMix, `prune --pattern channel --latency`, recipe obs, {len(seeds)} seed(s), real images:")
    head("model", "time asked", "top-1 %", "SNR dB", "MACs %", "parameters %", "kB", *SPEED)
    for target in TARGETS:
        for share in TIMES:
            goal = make_goal("channel", None, latency=share)
            found = [shares(pruned(target, "real-latency", goal, REAL, seed, folder), target) for seed in seeds]
            cells = [cell([facts[key] for facts in found], digits) for key, digits in COLUMNS.items()]
            print(f"| {target} | {share} | {' | '.join(cells)} |", flush=True)


def float_copy(target: str, folder: Path) -> Path:
    """The float model in the folder, to be judged there as the others are."""
    name, path = f"{target}-float", zoo.model_path(target)
    return written(folder, name, [digest(path.read_bytes().hex())], lambda copy: copy.write_bytes(path.read_bytes()))


def print_peer(seed: int, folder: Path, peers: Sequence[str], alone: bool) -> None:
    """Rows of each tool at each budget: right after pruning, and after the same distillation."""
    print(
        f"\nMixMix and Torch-Pruning {peer_python(folder)[1]}, then `distill` ({STEPS} steps of 64, the same 128 real"
        f" images, the float model as teacher), seed {seed}:"
    )
    asked = ("distilled, statistics trained",) + (("distilled, `statistics=false`",) if alone else ())
    head("model", "MACs asked", "tool", "MACs %", "parameters %", "kB", *SPEED, "right after", *asked)
    for target in TARGETS:
        for share in SHARES:
            goal = make_goal("channel", None, share)
            files = {"MixMix": pruned(target, "real", goal, REAL, seed, folder)}
            files |= {f"Torch-Pruning, {title}": peer_pruned(target, share, title, folder) for title in peers}
            for title, path in files.items():
                after = [distilled(target, path, seed, folder)]
                after += [distilled(target, path, seed, folder, "statistics=false")] if alone else []
                facts = shares(path, target)
                said = [f"{facts[key]:.{digits}f}" for key, digits in list(COLUMNS.items())[2:]]
                said += [accuracy(file, target) for file in (path, *after)]
                print(f"| {target} | {share} | {title} | {' | '.join(said)} |", flush=True)


def accuracy(path: Path, target: str) -> str:
    facts = facts_of(path, target)
    return f"{facts['top1']:.2f} %, {facts['snr']:.1f} dB"


def print_sparse(seed: int, folder: Path) -> None:
    print(f"\nPruned weight by weight (obs, 128 real images), then `distill`, {STEPS} steps, seed {seed}:")
    head("model", "zeros asked", "zeros % before", "after", "before", "distilled, `statistics=false`")
    for target, sparsity in SPARSE:
        student = pruned(target, "real", make_goal("unstructured", sparsity), REAL, seed, folder)
        files = [student, distilled(target, student, seed, folder, "statistics=false")]
        zeros = [f"{facts_of(path, target)['sparsity']:.1f}" for path in files]
        print(f"| {target} | {sparsity} | {' | '.join([*zeros, *(accuracy(path, target) for path in files)])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="rows of Torch-Pruning")
    parser.add_argument("--trained-only", action="store_true", help="leave `statistics=false` out of the peer's table")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"{machine()}; 128 images a set, n = {len(judging()):,} test images")
    if "images" in options.tables:
        print_images(SEEDS[: options.seeds], folder)
    if "time" in options.tables:
        print_time(SEEDS[: options.seeds], folder)
    if "peer" in options.tables:
        print_peer(SEEDS[0], folder, options.peers, not options.trained_only)
    if "sparse" in options.tables:
        print_sparse(SEEDS[0], folder)


def main_of_peer() -> None:
    parser = argparse.ArgumentParser(prog="channels.py run-peer")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("share", type=float)
    parser.add_argument("title", choices=PEERS)
    parser.add_argument("output", type=Path)
    given = parser.parse_args(sys.argv[2:])
    run_peer(given.target, given.share, PEERS[given.title], given.output)


if __name__ == "__main__":
    main_of_peer() if sys.argv[1:2] == ["run-peer"] else main()

"""The whole job on the embedded zoo: what images from models are worth, in one table.

Target: the inverted-residual classifier. Its weights (and activations) are brought to a few bits by nearest rounding,
or the smallest of them removed, and both by reconstruction on Gaussian noise, on images made from the target alone, on
images made from the whole zoo, and on real training images, the bound. Every accuracy is that of a written file in
onnxruntime on 1,000 test images.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import OutputError
from converters.load import load_classifier
from converters.outputs import TEMPORARY
from recipes import zoo
from recipes.checkpoint import states_of
from recipes.image_store import clear_set
from recipes.images import PREVIEW, ImageSet, gaussian_noise, load_images
from recipes.progress import Progress, Silent
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNE
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE as QUANTIZE
from recipes.quantize.settings import QuantizeSettings
from recipes.refusals import check_empty, is_set
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from recipes.validate import Validation, validate

TARGET = "inverted"
NEAREST, NOISE, SINGLE, ZOO, REAL = "nearest", "noise", "single model", "mixed zoo", "real images"
COLUMNS = (NEAREST, NOISE, SINGLE, ZOO, REAL)
IMAGES = 128
RESULTS, SINGLE_IMAGES, ZOO_IMAGES = "results.json", "images-single", "images-zoo"


@dataclass(frozen=True)
class Row:
    """What is asked for: widths, or a share of the weights to remove."""

    bits: int = 0
    act_bits: int | None = None
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        if self.sparsity:
            return f"{100 * self.sparsity:g} % sparse"
        return f"W{self.bits}" + ("" if self.act_bits is None else f"A{self.act_bits}")

    @property
    def word(self) -> str:
        """For file names."""
        return f"s{100 * self.sparsity:g}" if self.sparsity else self.name.lower()


ROWS = (Row(4), Row(2), Row(4, 4), Row(2, 4), Row(sparsity=0.7))


@dataclass(frozen=True)
class Cell:
    """One smaller model: the row, and the column (how, or on which images)."""

    row: Row
    column: str

    @property
    def file_name(self) -> str:
        return f"{TARGET}.{self.row.word}.{self.column.replace(' ', '-')}.onnx"


CELLS = [Cell(row, column) for row in ROWS for column in COLUMNS]


@dataclass
class Demo:
    """The table: float accuracy, and top-1 of each cell by (row, column)."""

    directory: Path
    target: str
    float_top1: float
    top1: dict[tuple[str, str], float]
    validation: Validation
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    directory: Path, *, seed: int = 0, overwrite: bool = False, workers: int = 2, progress: Progress | None = None
) -> Demo:
    """Run everything into `directory`. Raises OutputError when it holds something already."""
    progress = progress or Silent()
    _make_room(directory, overwrite)
    started = time.perf_counter()
    reference = load_classifier(zoo.model_path(TARGET))
    sets = {
        NOISE: gaussian_noise(IMAGES, 1, reference.spec.size, seed),
        SINGLE: _synthesize([TARGET], directory / SINGLE_IMAGES, seed, progress),
        ZOO: _synthesize(zoo.FAMILIES, directory / ZOO_IMAGES, seed, progress),
        REAL: load_images(zoo.calibration_images_path(), IMAGES),
    }
    shutil.copy(directory / ZOO_IMAGES / PREVIEW, directory / PREVIEW)
    made = time.perf_counter()
    with progress.task(f"making {TARGET} smaller {len(CELLS)} times", len(CELLS)) as task:
        jobs = [(cell, sets[ZOO if cell.column == NEAREST else cell.column], directory, seed) for cell in CELLS]
        for index in side_by_side(compress_cell, jobs, workers):
            task.advance(1, f"{CELLS[index].row.name} {CELLS[index].column}")
    compressed = time.perf_counter()
    candidates = [load_classifier(directory / cell.file_name) for cell in CELLS]
    validation = validate(reference, candidates, load_images(zoo.test_images_path()), progress=progress)
    top1 = {
        (cell.row.name, cell.column): judged.top1 or 0.0
        for cell, judged in zip(CELLS, validation.candidates, strict=True)
    }
    seconds = {
        "synthesis": made - started,
        "compression": compressed - made,
        "validation": time.perf_counter() - compressed,
    }
    demo = Demo(directory, TARGET, validation.reference.top1 or 0.0, top1, validation, seconds)
    (directory / RESULTS).write_text(json.dumps(to_json(demo), indent=1) + "\n")
    return demo


def to_json(demo: Demo) -> dict[str, object]:
    """The table as JSON types."""
    rows: dict[str, dict[str, float]] = {}
    for (row, column), value in demo.top1.items():
        rows.setdefault(row, {})[column] = value
    return {
        "dir": str(demo.directory),
        "target": demo.target,
        "images": demo.validation.images,
        "float": demo.float_top1,
        "top1": rows,
        "seconds": {key: round(value, 1) for key, value in demo.seconds.items()},
    }


def _make_room(directory: Path, overwrite: bool) -> None:
    """Clear away what an earlier demo wrote, and nothing else, if the user said so."""
    if not overwrite or not directory.is_dir():
        check_empty(directory)
    elif any(directory.iterdir()) and not is_set(directory / SINGLE_IMAGES):
        raise OutputError(f"{directory} was not written by the demo, so --force will not clear it: remove it first")
    try:
        for cell in CELLS:
            path = directory / cell.file_name
            for file in (path, *states_of(path)):
                file.unlink(missing_ok=True)
        for path in directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in (RESULTS, PREVIEW):
            (directory / name).unlink(missing_ok=True)
        for name in (ZOO_IMAGES, SINGLE_IMAGES):  # by the last one it is known
            if is_set(directory / name):
                clear_set(directory / name)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be made ready ({error.strerror}): choose another output") from error


def _synthesize(names: Sequence[str], directory: Path, seed: int, progress: Progress) -> ImageSet:
    modules = [to_torch(load_classifier(zoo.model_path(name))) for name in names]
    settings = load_synth_recipe("small", "default", (), None, {"images": IMAGES})
    progress.say(f"{IMAGES} images from {', '.join(names)}")
    synthesize(modules, directory, settings, seed=seed, overwrite=True, progress=progress)  # of what `_make_room` left
    return load_images(directory)


def side_by_side(work: Callable[..., object], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Do `work(*job)` for each of the jobs in processes of one thread each; the index of each that is done, as it is.

    Small layers gain nothing from more threads. Where one fails, or the caller is interrupted, the others end at once.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        others = set(active_children())
        with _deaf_to_interrupts():
            futures = {pool.submit(work, *job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(active_children()) - others:
                worker.terminate()
            raise


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started here never hear of Ctrl-C, which a terminal sends to all: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def compress_cell(cell: Cell, images: ImageSet, directory: Path, seed: int) -> None:
    """One cell, in a process of its own."""
    classifier: Classifier = load_classifier(zoo.model_path(TARGET))
    output, row, trained = directory / cell.file_name, cell.row, cell.column != NEAREST
    if row.sparsity:
        pruning = load_recipe(PruneSettings, PRUNE, "obs" if trained else "one-shot")
        prune(classifier, images, output, pruning, make_goal("unstructured", row.sparsity), seed=seed)
    else:
        settings = load_recipe(QuantizeSettings, QUANTIZE, "qdrop" if trained else "nearest")
        quantize(classifier, images, output, settings, row.bits, row.act_bits, seed=seed)

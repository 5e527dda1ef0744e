"""The whole job on the embedded zoo: what images from models are worth, in one table.

Target: the inverted-residual classifier. Its weights (and activations) are brought to a few bits by nearest rounding,
and by reconstruction on Gaussian noise, on images made from the target alone, on images made from the whole zoo, and
on real training images, the bound. Every accuracy is that of a written file in onnxruntime on 1,000 test images.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from converters.classifier import Classifier
from converters.errors import OutputError
from converters.load import load_classifier
from converters.torch_module import to_torch
from recipes import zoo
from recipes.images import PREVIEW, ImageSet, gaussian_noise, load_images
from recipes.progress import Progress, Silent
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from recipes.validate import Validation, validate

TARGET = "inverted"
WIDTHS: tuple[tuple[int, int | None], ...] = ((4, None), (2, None), (4, 4), (2, 4))
NEAREST, NOISE, SINGLE, ZOO, REAL = "nearest", "noise", "single model", "mixed zoo", "real images"
COLUMNS = (NEAREST, NOISE, SINGLE, ZOO, REAL)
IMAGES = 128
RESULTS = "results.json"


@dataclass(frozen=True)
class Cell:
    """One quantization: the column (how, or on which images) and the widths."""

    column: str
    bits: int
    act_bits: int | None

    @property
    def width(self) -> str:
        return f"W{self.bits}" + ("" if self.act_bits is None else f"A{self.act_bits}")

    @property
    def file_name(self) -> str:
        return f"{TARGET}.{self.width.lower()}.{self.column.replace(' ', '-')}.onnx"


@dataclass
class Demo:
    """The table: float accuracy, and top-1 of each cell by (width, column)."""

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
        SINGLE: _synthesize([TARGET], directory / "images-single", seed, progress),
        ZOO: _synthesize(zoo.FAMILIES, directory / "images-zoo", seed, progress),
        REAL: load_images(zoo.calibration_images_path(), IMAGES),
    }
    shutil.copy(directory / "images-zoo" / PREVIEW, directory / PREVIEW)
    made = time.perf_counter()
    cells = [Cell(column, bits, act_bits) for bits, act_bits in WIDTHS for column in COLUMNS]
    _quantize_all(cells, sets, directory, seed, workers, progress)
    quantized = time.perf_counter()
    candidates = [load_classifier(directory / cell.file_name) for cell in cells]
    validation = validate(reference, candidates, load_images(zoo.test_images_path()), progress=progress)
    top1 = {
        (cell.width, cell.column): judged.top1 or 0.0 for cell, judged in zip(cells, validation.candidates, strict=True)
    }
    seconds = {
        "synthesis": made - started,
        "quantization": quantized - made,
        "validation": time.perf_counter() - quantized,
    }
    demo = Demo(directory, TARGET, validation.reference.top1 or 0.0, top1, validation, seconds)
    (directory / RESULTS).write_text(json.dumps(to_json(demo), indent=1) + "\n")
    return demo


def to_json(demo: Demo) -> dict[str, object]:
    """The table as JSON types."""
    rows: dict[str, dict[str, float]] = {}
    for (width, column), value in demo.top1.items():
        rows.setdefault(width, {})[column] = value
    return {
        "dir": str(demo.directory),
        "target": demo.target,
        "images": demo.validation.images,
        "float": demo.float_top1,
        "top1": rows,
        "seconds": {key: round(value, 1) for key, value in demo.seconds.items()},
    }


def _make_room(directory: Path, overwrite: bool) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if not overwrite:
            raise OutputError(f"{directory} is not empty: choose another folder with -o, or pass --force to replace it")
        if not directory.is_dir() or not ((directory / RESULTS).is_file() or (directory / "images-single").is_dir()):
            raise OutputError(f"{directory} was not written by the demo, so --force will not clear it: remove it first")
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be created ({error.strerror}): choose another output") from error


def _synthesize(names: Sequence[str], directory: Path, seed: int, progress: Progress) -> ImageSet:
    modules = [to_torch(load_classifier(zoo.model_path(name))) for name in names]
    settings = load_synth_recipe("default", "default", (), None, {"images": IMAGES})
    progress.say(f"{IMAGES} images from {', '.join(names)}")
    synthesize(modules, directory, settings, seed=seed, progress=progress)
    return load_images(directory)


def _quantize_all(
    cells: Sequence[Cell], sets: dict[str, ImageSet], directory: Path, seed: int, workers: int, progress: Progress
) -> None:
    """Every cell, side by side in processes of one thread each: small layers gain nothing from more threads."""
    context = get_context("spawn")
    with (
        progress.task(f"quantizing {TARGET} {len(cells)} times", len(cells)) as task,
        ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        futures = {
            pool.submit(
                quantize_cell, cell, sets[ZOO if cell.column == NEAREST else cell.column], directory, seed
            ): cell
            for cell in cells
        }
        for future in as_completed(futures):
            future.result()
            task.advance(1, f"{futures[future].width} {futures[future].column}")


def quantize_cell(cell: Cell, images: ImageSet, directory: Path, seed: int) -> None:
    """One cell, in a process of its own."""
    classifier: Classifier = load_classifier(zoo.model_path(TARGET))
    method = "nearest" if cell.column == NEAREST else "qdrop"
    settings = load_recipe(QuantizeSettings, PACKAGE, method)
    quantize(classifier, images, directory / cell.file_name, settings, cell.bits, cell.act_bits, seed=seed)

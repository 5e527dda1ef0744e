"""Students that know nothing, taught without data: a random net of another family, by the embedded zoo's best.

    python benchmarks/distillation.py -o distilled/                          # about 10 minutes on one core
    python benchmarks/distillation.py -o distilled/ --set features=0         # logits alone
    python benchmarks/distillation.py -o distilled/ --images 4096 --set steps=6000     # 25 minutes

Images from the six models (recipe small); the student's accuracy is that of the written file, through onnxruntime, on
the 1,000 embedded test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx
import torch
import zoo_models
from record import machine
from train_zoo import describe

from converters.conversion import to_torch
from converters.export import export_kept
from converters.load import load_classifier
from recipes import zoo
from recipes.distill.engine import distill
from recipes.distill.settings import PACKAGE, DistillSettings
from recipes.images import load_images
from recipes.settings import load_recipe
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from recipes.validate import validate

TEACHER, STUDENTS = "plain", ("residual", "inverted")


def untrained(name: str, path: Path) -> Path:
    """An embedded family with the weights that torch begins with (seed 0)."""
    torch.manual_seed(0)
    export_kept(getattr(zoo_models, name)().eval(), torch.zeros(2, 1, 28, 28), path)
    onnx.save(describe(onnx.load(path), name, 0.1), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    made = load_synth_recipe("small", "default", (), None, {"images": options.images})
    models = [to_torch(load_classifier(zoo.model_path(name))) for name in zoo.FAMILIES]
    folder = options.output / f"images{options.images}"
    synthesize(models, folder, made, resume=folder.exists())
    images, test = load_images(folder), load_images(zoo.test_images_path())
    settings = load_recipe(DistillSettings, PACKAGE, "default", overrides=options.set)
    teacher = load_classifier(zoo.model_path(TEACHER))
    print("| student | before | after | teacher | seconds |\n| --- | --- | --- | --- | --- |")
    for name in STUDENTS:
        student = load_classifier(untrained(name, options.output / f"{name}.onnx"))
        output = options.output / f"{name}.distilled.onnx"
        result = distill(teacher, student, images, output, settings, overwrite=True)
        judged = validate(teacher, [student, load_classifier(output)], test, threads=1)
        before, after = (100 * (candidate.top1 or 0.0) for candidate in judged.candidates)
        bound = 100 * (judged.reference.top1 or 0.0)
        print(f"| {name} | {before:.1f} | {after:.1f} | {bound:.1f} | {result.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

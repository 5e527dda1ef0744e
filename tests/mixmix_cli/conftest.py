"""A model, images made by the command, results of real runs, and the report of all of them."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mixmix_cli.__main__ import main
from recipes import zoo
from recipes.demo import COLUMNS, Demo, to_json
from recipes.validate import Reference, Validation
from tests.mixmix_cli.command import BRIEFLY, TINY
from tests.mixmix_cli.report_page import NAMES, Page


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output is as wide as where nobody has said how wide."""
    monkeypatch.delenv("COLUMNS", raising=False)


SHORT = ("--set", 'stages=[{"scale":0.5,"steps":2},{"scale":1.0,"steps":2}]')


def printed(folder: Path, name: str, *arguments: object, status: int = 0) -> Path:
    """A file with what a command printed."""
    text = io.StringIO()
    with redirect_stdout(text):
        assert main([*map(str, arguments), "--json", "-q"]) == status
    path = folder / f"{name}.json"
    path.write_text(text.getvalue())
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of real runs: `data` of synth, `demo`, and a JSON file for each command."""
    folder = tmp_path_factory.mktemp("made")
    model, data, real = folder / "model.onnx", folder / "data", ("--data", zoo.calibration_images_path(), "-n", 32)
    model.write_bytes(zoo.model_path("inverted").read_bytes())
    small, fast = ("--data", data), ("--effort", "fast")
    plain = zoo.model_path("plain")
    printed(folder, "synth", "synth", model, plain, "-o", data, "-n", 6, "--batch", 4, *SHORT)
    printed(folder, "quantize", "quantize", model, "--bits", 2, *small, "--method", "nearest")
    printed(folder, "brecq", "quantize", model, "--bits", 3, *small, *fast, "--set", "steps=4")
    printed(folder, "prune", "prune", model, "--sparsity", 0.5, *small, *fast, *BRIEFLY)
    printed(folder, "distill", "distill", plain, model, *small, "--steps", 1, "--set", "batch=4")
    files = [model.with_name(f"model.{word}.onnx") for word in ("w2", "w3", "s50")]
    gates = ("--max-drop", 0.02, "--layers")
    printed(folder, "validate", "validate", model, *files, *real, *gates, status=1)
    printed(folder, "pass", "validate", model, model, *real, "--min-agreement", 0.9)
    printed(folder, "inspect", "inspect", model, files[0])
    printed(folder, "compare", "data", "compare", data, *real[1:2], "--model", model, "-n", 6, "--permutations", 9)
    demo = folder / "demo"
    demo.mkdir()
    shutil.copy(data / "preview.png", demo)
    top1 = {
        (row, column): (1 + i + 5 * j) / 16 for i, column in enumerate(COLUMNS) for j, row in enumerate(("W4", "W2"))
    }
    table = Demo(demo, "inverted", 0.9375, top1, Validation(Reference(model, 0.9375, 1.0, 1, 1.0), [], 1000, "real"))
    (demo / "results.json").write_text(json.dumps(to_json(table)))
    return folder


@pytest.fixture(scope="session")
def page(made: Path) -> Page:
    """The page of all that was made."""
    output = made / "all.html"
    inputs = [made / "data", made / "demo", *(made / f"{name}.json" for name in NAMES)]
    assert main(["report", *map(str, inputs), "-o", str(output), "-q"]) == 0
    return Page(output)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight synthesized images, made by the command."""
    directory = tmp_path_factory.mktemp("synth") / "data"
    models = [str(zoo.model_path(name)) for name in ("inverted", "plain")]
    assert main(["synth", *models, "-o", str(directory), "-n", "8", *TINY]) == 0
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the target, so that outputs beside it do not touch the zoo."""
    path = tmp_path / "model.onnx"
    path.write_bytes(zoo.model_path("plain").read_bytes())
    return path

"""The three floors: imports only go down, and each package sees only what is its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "converters": {"recipes", "mixmix_cli", "click", "rich"},
    "recipes": {"mixmix_cli", "click", "rich", "onnx", "onnx_ir", "onnxscript", "onnx2torch", "onnxruntime"},
    "mixmix_cli": {"onnx", "onnx_ir", "onnxscript", "onnx2torch", "onnxruntime", "numpy", "torch"},
}
SIBLINGS = ("synth", "quantize", "prune", "distill")


def imported(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports, as dotted names."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_down(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        seen = {name.split(".")[0] for name in imported(file)}
        assert not seen & FORBIDDEN[package], f"{file} imports {seen & FORBIDDEN[package]}"


def test_the_page_is_made_of_results() -> None:
    for file in (ROOT / "mixmix_cli" / "report").rglob("*.py"):
        assert "converters" not in {name.split(".")[0] for name in imported(file)}, file


@pytest.mark.parametrize("package", SIBLINGS)
def test_recipes_do_not_import_one_another(package: str) -> None:
    others = [f"recipes.{name}" for name in SIBLINGS if name != package]
    for file in (ROOT / "recipes" / package).rglob("*.py"):
        assert not [name for name in imported(file) if name.startswith(tuple(others))], file


@pytest.mark.parametrize("package", SIBLINGS)
def test_what_recipes_share_depends_on_none_of_them(package: str) -> None:
    """A module that one of them imports from the middle, and what that imports, is of none of the others."""
    waiting = [name for file in (ROOT / "recipes" / package).rglob("*.py") for name in imported(file)]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        file = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or not name.startswith("recipes.") or not file.is_file():
            continue
        seen.add(name)
        assert name.split(".")[1] not in set(SIBLINGS) - {package}, f"{package} depends on {name}"
        waiting.extend(imported(file))


def test_face_starts_light() -> None:
    """What --help loads must not pull in torch or onnx: heavy imports live inside commands."""
    for file in (ROOT / "mixmix_cli").rglob("*.py"):
        heavy = {"torch", "converters", "recipes"}
        seen = {name.split(".")[0] for name in imported(file, top_level_only=True)}
        assert not seen & heavy, f"{file} imports {seen & heavy} at the top"

"""`mixmix distill TEACHER STUDENT`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixmix_cli import options


@click.command("distill", cls=options.CommandWithLists)
@click.argument("model", metavar="TEACHER", type=options.MODEL)
@click.argument("student", type=options.MODEL)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, instead of the recipe's.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: STUDENT.distilled.onnx beside it.")
@options.smaller
@options.input_spec
@options.recipe("default", "distillation")
@options.compute
@options.force
@options.common
def command(**given: Any) -> int:
    """Train STUDENT, a float ONNX classifier of any family, to answer as TEACHER does. No data is needed.

    What is said of the input (--mean, --std, --scale, --layout, --channels, --size) holds for both models: where they
    differ, leave it out and say it of each in a TOML file beside it (TEACHER.toml, STUDENT.toml, table [input]).

    Example: mixmix distill large.onnx small.onnx
    """
    from mixmix_cli.console import Terminal, percent
    from mixmix_cli.requests import request_from, show_result
    from recipes.distill.engine import output_path
    from recipes.distill.settings import PACKAGE, DistillSettings
    from recipes.pipeline import compress, distilling
    from recipes.settings import load_recipe

    terminal = Terminal(as_json=given["as_json"], quiet=given["quiet"], verbose=given["verbose"])
    overrides = [*given["overrides"], *([f"steps={given['steps']}"] if given["steps"] else [])]
    settings = load_recipe(DistillSettings, PACKAGE, given["recipe"], given["effort"], overrides)
    request = request_from(given, output_path(given["student"]), given["recipe"], terminal, student=given["student"])
    result, validation = compress(request, distilling(settings), terminal)
    zeros = f"; {percent(result.sparsity)} of its weights are zero, as before" if result.sparsity > 0.01 else ""
    return show_result(terminal, result, validation, f"{settings.steps} steps on {validation.images} images{zeros}")

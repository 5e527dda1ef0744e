"""`mixmix distill TEACHER STUDENT`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixmix_cli import options

if TYPE_CHECKING:
    from recipes.distill.settings import DistillSettings
    from recipes.ranks import Ranks


def output_path(student: Path) -> Path:
    """`student.distilled.onnx`, beside the student."""
    from converters.outputs import beside

    return beside(student, "distilled.onnx")


@click.command("distill", cls=options.CommandWithLists)
@click.argument("model", metavar="TEACHER", type=options.MODEL)
@click.argument("student", type=options.MODEL)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, instead of the recipe's.")
@click.option("-o", "--output", type=options.OUTPUT, help="Default: STUDENT.distilled.onnx beside it.")
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

    With several devices or machines, torchrun shares the training out:
    torchrun --nproc-per-node 4 -m mixmix_cli distill large.onnx small.onnx

    Example: mixmix distill large.onnx small.onnx
    """
    from mixmix_cli.requests import refuse_early

    refuse_early(given, given["output"] or output_path(given["student"]))
    from recipes.distill.settings import PACKAGE, DistillSettings
    from recipes.settings import load_recipe

    overrides = [*given["overrides"], *([f"steps={given['steps']}"] if given["steps"] else [])]
    settings = load_recipe(DistillSettings, PACKAGE, given["recipe"], given["effort"], overrides)

    from recipes.ranks import join_ranks

    with join_ranks(given["device"]) as ranks:
        return _distill(ranks, given, settings)


def _distill(ranks: Ranks, given: dict[str, Any], settings: DistillSettings) -> int:
    """What each process does; the first one alone says anything."""
    from mixmix_cli.console import terminal_for
    from mixmix_cli.phrases import counted, percent
    from mixmix_cli.requests import request_from, show_result
    from recipes.pipeline import compress, distilling

    terminal = terminal_for(given, ranks)
    output = output_path(given["student"])
    if given["data"] is None and given["images"] is None:
        given = {**given, "images": settings.images}
    request = request_from(given, output, given["recipe"], terminal, student=given["student"], ranks=ranks)
    result, validation = compress(request, distilling(settings), terminal)
    zeros = f"; {percent(result.sparsity)} of its weights are zero, as before" if result.sparsity > 0.01 else ""
    account = f"{counted(settings.steps, 'step')} on {counted(validation.images, 'image')}{zeros}"
    remedy = "give it more --steps, or more images (-n)"
    return ranks.lead(lambda: show_result(terminal, result, validation, account, remedy))

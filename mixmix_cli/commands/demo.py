"""`mixmix demo [-o DIR]`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mixmix_cli import options


@click.command("demo")
@click.option(
    "-o", "--output", default=Path("mixmix-demo"), show_default=True, type=click.Path(path_type=Path), help="Folder."
)
@options.seed
@options.force
@options.common
def command(**given: Any) -> int:
    """Run the whole job on the embedded zoo and print one table: what images made from models are worth.

    Example: mixmix demo -o mixmix-demo
    """
    if not given["force"]:
        from recipes.refusals import check_empty

        check_empty(given["output"])
    from mixmix_cli.console import table, terminal_for
    from mixmix_cli.phrases import percent
    from recipes.demo import COLUMNS, ROWS, run_demo, to_json

    terminal = terminal_for(given)
    demo = run_demo(
        given["output"],
        seed=given["seed"],
        overwrite=given["force"],
        workers=max(1, min(4, os.cpu_count() or 1)),
        progress=terminal,
    )
    if terminal.as_json:
        terminal.document(to_json(demo))
        return 0
    rows = []
    for row in ROWS:
        rows.append([row.name, *(percent(demo.top1[row.name, column]) for column in COLUMNS)])
    title = (
        f"{demo.target}: top-1 on {demo.validation.images:,} test images, float {percent(demo.float_top1)};"
        " nearest rounding or smallest out, then reconstruction on"
    )
    terminal.show(table(["", *COLUMNS], rows, title))
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.seconds.items())
    terminal.show(f"{spent}; models and images are in {demo.directory}, the images at a glance in preview.png there")
    return 0

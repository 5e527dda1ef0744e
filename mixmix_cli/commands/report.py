"""`mixmix report DIR|FILES... -o report.html`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixmix_cli import options


@click.command("report")
@click.argument("inputs", nargs=-1, required=True, metavar="DIR|FILES...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    default=Path("report.html"),
    show_default=True,
    type=options.OUTPUT,
    help="The page to write.",
)
@options.force
@options.common
def command(**given: Any) -> int:
    """Write one self-contained page of what other commands made: images, losses, accuracy, gates, error by layer.

    Takes folders that synth or demo wrote, and files with what --json printed for quantize, prune, distill, validate,
    synth, inspect, data compare or demo, in any mix.

    Example: mixmix report data/ quantize.json validate.json -o report.html
    """
    from converters.outputs import ensure_writable
    from mixmix_cli.report.documents import read_source

    output = given["output"]
    ensure_writable(output, overwrite=given["force"], inputs=given["inputs"])
    sources = [read_source(path) for path in given["inputs"]]

    from mixmix_cli.console import terminal_for
    from mixmix_cli.phrases import counted, size
    from mixmix_cli.report.models import summarise
    from mixmix_cli.report.page import render
    from mixmix_cli.report.sections import section_of, title_of
    from recipes.records import write_text

    terminal = terminal_for(given)
    with terminal.task("drawing", len(sources)) as task:
        sections = []
        for source in sources:
            sections.append(section_of(source))
            task.advance(1, source.path.name)
    page = render(title_of(sections), summarise(sources), sections)
    write_text(output, page)
    if terminal.as_json:
        told = [{"kind": section.kind, "title": section.title, "source": section.source} for section in sections]
        terminal.document({"output": output, "sections": told})
    else:
        terminal.show(
            f"{output}: {counted(len(sections), 'section')}, {size(output.stat().st_size)}; open it in a browser"
        )
    return 0

"""`mixmix inspect MODEL...`"""

from __future__ import annotations

from typing import Any

import click

from mixmix_cli import options


@click.command("inspect")
@click.argument("models", nargs=-1, required=True, type=options.MODEL)
@click.option("--size", callback=options.pixels, help="Height and width where the file leaves them open.")
@options.input_spec
@options.common
def command(**given: Any) -> int:
    """Say what each model is, what it expects, and what can be done with it.

    Example: mixmix inspect model.onnx
    """
    from converters.load import load_classifier
    from mixmix_cli.console import Terminal
    from mixmix_cli.results import inspection_json, inspection_page
    from recipes.inspect import inspect_model

    terminal = Terminal(as_json=given["as_json"], quiet=given["quiet"], verbose=given["verbose"])
    spec = {**options.spec_from(given), "size": given["size"]}
    results = []
    with terminal.task("inspecting", len(given["models"])) as task:
        for path in given["models"]:
            results.append(inspect_model(load_classifier(path, spec)))
            task.advance(1, path.name)
    if terminal.as_json:
        terminal.document([inspection_json(result) for result in results])
    else:
        for result in results:
            terminal.show(inspection_page(result))
    return 0

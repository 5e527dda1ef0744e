"""`mixmix inspect MODEL...`"""

from __future__ import annotations

from typing import Any

import click

from mixmix_cli import options


@click.command("inspect")
@click.argument("models", nargs=-1, required=True, type=options.MODEL)
@click.option(
    "--pattern", help="Ask whether all layers that can have it have this N:M sparsity, such as 2:4; status 1 if not."
)
@click.option("--size", callback=options.pixels, help="Height and width where the file leaves them open.")
@options.input_spec
@options.common
def command(**given: Any) -> int:
    """Say what each model is, what it expects, and what can be done with it.

    Example: mixmix inspect model.onnx
    """
    from converters.errors import MixMixError
    from converters.outputs import ensure_model
    from recipes.patterns import parse_n_of_m

    pattern = None if given["pattern"] is None else parse_n_of_m(given["pattern"])
    if len(given["models"]) == 1:  # of several, the others are worth knowing, and each is asked for in its turn
        ensure_model(given["models"][0])
    from converters.load import load_classifier
    from mixmix_cli.console import terminal_for
    from mixmix_cli.results import inspection_json, inspection_page, pattern_page
    from recipes.inspect import inspect_model

    terminal = terminal_for(given)
    spec = {**options.spec_from(given), "size": given["size"]}
    results, errors = [], []
    with terminal.task("inspecting", len(given["models"])) as task:
        for path in given["models"]:
            try:
                results.append(inspect_model(load_classifier(path, spec), pattern))
            except MixMixError as error:  # the others are worth knowing all the same
                errors.append(error)
            task.advance(1, path.name)
    if terminal.as_json and results:
        terminal.document([inspection_json(result) for result in results])
    elif results:
        for result in results:
            terminal.show(inspection_page(result))
            if pattern is not None:
                terminal.show(pattern_page(result, pattern.name))
    for earlier in errors[:-1]:
        terminal.annotate(f"Error: {earlier}")
    if errors:
        raise errors[-1]
    return 0 if pattern is None or all(result.has_pattern for result in results) else 1

"""`mixmix zoo list|show|export`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixmix_cli import __version__, options


@click.group("zoo")
def command() -> None:
    """The paper's model zoos: what is in them, and their ONNX files from an installed model library.

    \b
    Example: mixmix zoo list
             mixmix zoo show mixmix-mobile
             mixmix zoo export mixmix-mobile -o models/
    """


@command.command("list")
@options.common
def list_zoos(**given: Any) -> int:
    """List the zoos by name, and how many of their models the installed libraries have.

    Example: mixmix zoo list
    """
    from mixmix_cli.console import table, terminal_for
    from recipes.zoo import EMBEDDED, FAMILIES, named_zoos

    terminal = terminal_for(given)
    zoos = named_zoos().values()
    rows = [(zoo.name, len(zoo.members), sum(member.installed for member in zoo.members), zoo.about) for zoo in zoos]
    rows.append(("embedded", len(FAMILIES), len(FAMILIES), f"small Fashion-MNIST classifiers, in {EMBEDDED}"))
    if terminal.as_json:
        keys = ("name", "models", "installed", "about")
        terminal.document([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        lines = [[name, str(models), str(installed), about] for name, models, installed, about in rows]
        terminal.show(table(["zoo", "models", "installed", "about"], lines, texts=["about"]))
    return 0


@command.command("show")
@click.argument("zoo", nargs=-1, required=True, metavar="NAME|MODELS...")
@options.common
def show(**given: Any) -> int:
    """Show the members of the zoo NAME, or measure the files MODELS as a zoo: how many of them the theory asks for.

    Example: mixmix zoo show mixmix-mobile
    """
    names = given["zoo"]
    files = [Path(name) for name in names if name.endswith(".onnx")]
    if files and len(files) < len(names):
        raise click.UsageError("name zoos or files, not both")
    from converters.outputs import ensure_model
    from mixmix_cli.console import terminal_for
    from mixmix_cli.results import files_json, files_page, zoo_json, zoo_page
    from recipes.zoo import find_zoo

    for file in files:
        ensure_model(file)
    zoos = [] if files or names == ("embedded",) else [find_zoo(name) for name in names]
    terminal = terminal_for(given)
    if not zoos:
        from converters.load import load_classifier
        from recipes.zoo_facts import embedded_files, show_files

        facts = show_files([load_classifier(file) for file in files] or embedded_files(), terminal)
        if terminal.as_json:
            terminal.document(files_json(facts))
        else:
            terminal.show(files_page(facts))
        return 0
    if terminal.as_json:
        documents = [zoo_json(zoo) for zoo in zoos]
        terminal.document(documents[0] if len(documents) == 1 else documents)
    else:
        for zoo in zoos:
            terminal.show(zoo_page(zoo))
    return 0


@command.command("export")
@click.argument("zoo", metavar="NAME")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the ONNX files.")
@click.option("--untrained", is_flag=True, help="Random weights: to try things out where nothing can be downloaded.")
@options.force
@options.common
def export(**given: Any) -> int:
    """Write the models of the zoo NAME as ONNX files, BatchNorm kept and input spec within; what is there stays.

    Exit status 2 when a model could not be had; the others are written.

    Example: mixmix zoo export mixmix-mobile -o models/
    """
    if given["zoo"] == "embedded" and given["untrained"]:
        raise click.UsageError("the embedded zoo comes with its weights: leave --untrained out")
    from mixmix_cli.console import terminal_for
    from recipes.zoo import export_embedded, find_zoo

    terminal = terminal_for(given)
    output, overwrite = given["output"], given["force"]
    if given["zoo"] == "embedded":
        done = export_embedded(output, overwrite=overwrite)
    else:
        zoo, trained = find_zoo(given["zoo"]), not given["untrained"]
        from recipes.libraries import export_zoo

        done = export_zoo(zoo, output, trained=trained, overwrite=overwrite, progress=terminal, version=__version__)
    if terminal.as_json:
        terminal.document({"dir": output, "written": done.written, "kept": done.kept, "failed": done.failed})
    else:
        hint = "" if overwrite else " (--force replaces them)"
        kept = f", {len(done.kept)} were there already{hint}" if done.kept else ""
        terminal.show(f"{len(done.written)} models written to {output}{kept}")
    for name, reason in done.failed.items():
        terminal.annotate(f"Error: {name}: {reason}")
    return 2 if done.failed else 0

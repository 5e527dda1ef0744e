"""`mixmix recipe list|show`"""

from __future__ import annotations

from typing import Any

import click

from mixmix_cli import options


@click.group("recipe")
def command() -> None:
    """What --recipe and --method name: all recipes, and every key that --set can change.

    \b
    Example: mixmix recipe list
             mixmix recipe show quantize qdrop
    """


@command.command("list")
@options.common
def list_recipes(**given: Any) -> int:
    """List the recipes of each command.

    Example: mixmix recipe list
    """
    from mixmix_cli.console import table, terminal_for
    from recipes.catalogue import KINDS, read_recipe

    terminal = terminal_for(given)
    rows = [
        (command, name, name == kind.default, read_recipe(kind, name).about)
        for command, kind in KINDS.items()
        for name in kind.names
    ]
    if terminal.as_json:
        keys = ("command", "recipe", "default", "about")
        terminal.document([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        cells = [[command, f"{name} *" if default else name, about] for command, name, default, about in rows]
        terminal.show(table(["command", "recipe", "about"], cells, texts=["recipe", "about"]))
        terminal.show("* where none is named; synth takes small, labels or small-labels where the models ask for it")
    return 0


@command.command("show")
@click.argument("for_command", metavar="COMMAND")
@click.argument("recipe", metavar="NAME|FILE.toml")
@options.common
def show(**given: Any) -> int:
    """Show all keys of a recipe of COMMAND.

    As a file, complete, that --recipe takes: edit it, or change one key with --set.

    \b
    Example: mixmix recipe show quantize qdrop
             mixmix recipe show synth default > mine.toml
    """
    from converters.errors import nearest
    from mixmix_cli.console import terminal_for
    from recipes.catalogue import KINDS, read_recipe

    kind = KINDS.get(given["for_command"])
    if kind is None:
        hint = nearest(given["for_command"], KINDS)
        raise click.UsageError(f"{given['for_command']} has no recipes{hint}: choose one of {', '.join(KINDS)}")
    recipe = read_recipe(kind, given["recipe"])
    terminal = terminal_for(given)
    if terminal.as_json:
        names = {"command": given["for_command"], "recipe": given["recipe"], "about": recipe.about}
        keys = {key.name: {"value": key.value, "about": key.about, "words": key.words} for key in recipe.keys}
        terminal.document(names | {"keys": keys, "effort": recipe.efforts})
    else:
        terminal.show(recipe.text())
    return 0

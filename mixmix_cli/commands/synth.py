"""`mixmix synth MODELS... -o DIR`"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixmix_cli import __version__, options

if TYPE_CHECKING:
    from recipes.ranks import Ranks
    from recipes.settings import Effort

    Asked = tuple[Effort, Iterable[str], int | None, Mapping[str, Any]]
    """What `load_synth_recipe` takes beside the recipe's name."""


@click.command("synth")
@click.argument("models", nargs=-1, required=True, type=options.MODEL)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write the images to.")
@click.option("-n", "--images", type=click.IntRange(min=1), help="How many images.")
@click.option(
    "--size", callback=options.pixels, help="Height and width: 224 or 224x192 (default: the largest model's)."
)
@click.option("--batch", type=click.IntRange(min=1), help="Images optimised together.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps a batch, shared out over the stages of the recipe.")
@click.option("--models-per-step", type=click.IntRange(min=1), help="Draw this many of the models for each step.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run left in the folder.")
@options.input_spec
@options.recipe(None, "synthesis (default: what fits the models)")
@options.compute
@options.force
@options.common
def command(**given: Any) -> int:
    """Make calibration images from MODELS alone, by inverting all of them at once.

    With several devices or machines, torchrun deals the batches out:
    torchrun --nproc-per-node 4 -m mixmix_cli synth models/*.onnx -o data/

    Example: mixmix synth models/*.onnx -o data/
    """
    from converters.outputs import ensure_model
    from recipes.refusals import check_set_folder

    for path in given["models"]:
        ensure_model(path)
    check_set_folder(given["output"], resume=given["resume"], overwrite=given["force"])
    from recipes.synth.settings import load_synth_recipe

    changes = {key: given[key] for key in ("images", "batch", "models_per_step")}
    how = (given["effort"], given["overrides"], given["steps"], changes)
    load_synth_recipe(given["recipe"] or "default", *how)  # which one fits is known when the models are read
    from recipes.ranks import join_ranks

    with join_ranks() as ranks:
        return _synth(ranks, given, how)


def _synth(ranks: Ranks, given: dict[str, Any], how: Asked) -> int:
    """What each process does; the first one alone says anything."""
    from converters.load import load_classifier
    from mixmix_cli.console import terminal_for
    from mixmix_cli.phrases import counted
    from mixmix_cli.results import synthesis_json
    from recipes.devices import choose_device
    from recipes.pipeline import choose_models, convert_all, load_suitable_recipe
    from recipes.synth.engine import synthesize

    terminal = terminal_for(given, ranks)
    device = choose_device(given["device"])
    classifiers = [
        load_classifier(path, options.spec_from(dict(given)), open_size=given["size"]) for path in given["models"]
    ]
    for classifier in classifiers:
        terminal.tell_choices(classifier)
    recipe, settings = load_suitable_recipe(given["recipe"], classifiers, *how, terminal)
    modules = convert_all(choose_models(classifiers, settings, recipe), device, terminal)
    try:
        result = synthesize(
            modules,
            given["output"],
            settings,
            recipe=recipe,
            size=given["size"],
            seed=given["seed"],
            resume=given["resume"],
            overwrite=given["force"],
            progress=terminal,
            versions={"mixmix": __version__},
            ranks=ranks,
        )
    except KeyboardInterrupt:
        terminal.say("the same command with --resume goes on from there")
        raise
    if not ranks.leads:
        return 0
    if terminal.as_json:
        terminal.document(synthesis_json(result))
    else:
        made = counted(result.images, "image")
        terminal.show(f"{made} in {result.directory} ({result.seconds:.0f} s); look at preview.png there")
        if result.retried:
            retried = counted(result.retried, "time")
            terminal.show(f"  {retried} a batch diverged and was made again from another seed")
        for name, value in result.losses.items():
            terminal.show(f"  {name}: {value:.3f}")
    return 0

"""`mixmix quantize MODEL --bits B`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixmix_cli import __version__, options

BITS = click.IntRange(2, 8)
METHODS = ("nearest", "adaround", "brecq", "qdrop")


@click.command("quantize", cls=options.CommandWithLists)
@click.argument("model", type=options.MODEL)
@click.option("--bits", required=True, type=BITS, help="Bits of the weights.")
@click.option("--act-bits", type=BITS, help="Bits of the activations; float when not given.")
@click.option("--data", type=click.Path(path_type=Path), help="Images to calibrate on (folder, synth output or .npz).")
@click.option(
    "--zoo",
    cls=options.ListOption,
    multiple=True,
    type=options.MODEL,
    metavar="MODELS",
    help="Models to make images from when there is no --data.",
)
@click.option("-n", "--images", type=click.IntRange(min=1), help="Use or make this many images.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.w4.onnx beside the input.")
@click.option("--method", type=click.Choice(METHODS), default="qdrop", show_default=True, help="How to round.")
@click.option(
    "--max-drop", type=click.FloatRange(0, 1), help="Exit with status 1 when top-1 falls by more than this fraction."
)
@click.option("--size", callback=options.pixels, help="The model's height and width where the file leaves them open.")
@options.input_spec
@options.recipe(None, "quantization (overrides --method)")
@click.option("--synth-recipe", help="Recipe of the images that are made (default: what fits the models).")
@options.compute
@options.force
@options.common
def command(**given: Any) -> int:
    """Quantize MODEL to --bits bits. Without --data, images are made from --zoo, or from MODEL itself.

    Example: mixmix quantize --bits 4 model.onnx
    """
    from converters.load import load_classifier
    from mixmix_cli.console import Terminal, size
    from mixmix_cli.results import compression_json, validation_table
    from recipes.pipeline import Request, compress
    from recipes.quantize.engine import output_path
    from recipes.quantize.settings import PACKAGE, QuantizeSettings
    from recipes.settings import choose_device, load_recipe
    from recipes.validate import Gates

    terminal = Terminal(as_json=given["as_json"], quiet=given["quiet"], verbose=given["verbose"])
    recipe, effort = given["recipe"] or given["method"], given["effort"]
    settings = load_recipe(QuantizeSettings, PACKAGE, recipe, effort, given["overrides"])
    device = choose_device(given["device"])
    spec = options.spec_from(given)
    classifier = load_classifier(given["model"], {**spec, "size": given["size"]})
    zoo = [load_classifier(path) for path in given["zoo"]]
    for model in (classifier, *zoo):
        terminal.tell_choices(model)
    request = Request(
        classifier=classifier,
        zoo=zoo,
        data=given["data"],
        bits=given["bits"],
        act_bits=given["act_bits"],
        output=given["output"] or output_path(given["model"], given["bits"], given["act_bits"]),
        settings=settings,
        recipe=recipe,
        synth_recipe=given["synth_recipe"],
        effort=effort,
        images=given["images"],
        gates=Gates(max_drop=given["max_drop"]),
        seed=given["seed"],
        device=device,
        overwrite=given["force"],
        version=__version__,
    )
    result, validation = compress(request, terminal)
    if terminal.as_json:
        terminal.document(compression_json(result, validation))
    else:
        terminal.show(
            f"{result.output}: {size(result.size_before)} -> {size(result.size_after)}"
            f" (1/{result.size_before / result.size_after:.1f}) in {result.seconds:.0f} s"
        )
        kept = "; ".join(f"{layer.name} {layer.bits} bits ({layer.reason})" for layer in result.kept)
        terminal.show(
            f"{len(result.kept)} of {len(result.layers)} layers are not at {result.bits} bits: {kept or 'none'}"
        )
        terminal.show(validation_table(validation))
        terminal.show(f"on the {validation.images} calibration images: hold it against others with mixmix validate")
    return 0 if validation.passed else 1

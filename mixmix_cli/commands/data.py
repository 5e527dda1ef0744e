"""`mixmix data export|compare`"""

from __future__ import annotations

from typing import Any

import click

from mixmix_cli import options


@click.group("data")
def command() -> None:
    """Hand image sets to other tools, and compare them.

    \b
    Example: mixmix data export data/ --model model.onnx -o calib.npz
             mixmix data compare data/ images/ --model model.onnx
    """


@command.command("export")
@click.argument("data", type=options.IMAGES)
@click.option("--model", required=True, type=options.MODEL, help="The model that is to take the tensors.")
@click.option("-o", "--output", required=True, type=options.OUTPUT, help="The .npz file to write.")
@click.option("-n", "--images", type=click.IntRange(min=1), help="Only this many images.")
@click.option("--size", callback=options.pixels, help="Height and width where the file leaves them open.")
@options.input_spec
@options.force
@options.common
def export(**given: Any) -> int:
    """Write the images of DATA as MODEL's input tensors: what calibration readers of other tools take.

    Example: mixmix data export data/ --model model.onnx -o calib.npz
    """
    from converters.outputs import ensure_model, ensure_writable

    output = given["output"]
    if output.suffix != ".npz" and not output.is_dir():
        raise click.UsageError(f"{output} does not end in .npz, as what is written does: choose another name")
    ensure_model(given["model"])
    ensure_writable(output, overwrite=given["force"], inputs=[given["data"], given["model"]])
    from converters.load import load_classifier
    from mixmix_cli.console import terminal_for
    from mixmix_cli.phrases import size
    from recipes.calibration import export_calibration
    from recipes.images import load_images

    terminal = terminal_for(given)
    classifier = load_classifier(given["model"], {**options.spec_from(given), "size": given["size"]})
    terminal.tell_choices(classifier)
    images = load_images(given["data"], given["images"], size=classifier.spec.size)
    result = export_calibration(classifier, images, output, overwrite=given["force"])
    if terminal.as_json:
        terminal.document(
            {"output": result.output, "key": result.key, "shape": result.shape, "dtype": result.dtype,
             "size_bytes": result.size_bytes}
        )  # fmt: skip
    else:
        shape = "x".join(map(str, result.shape))
        terminal.show(f"{result.output}: {result.key!r}, {result.dtype} {shape}, {size(result.size_bytes)}")
    return 0


@command.command("compare")
@click.argument("a", type=options.IMAGES)
@click.argument("b", type=options.IMAGES)
@click.option("--model", required=True, type=options.MODEL, help="The model in whose features they are compared.")
@click.option("-n", "--images", type=click.IntRange(min=1), help="Only this many images of each set.")
@click.option(
    "--permutations", type=click.IntRange(min=1), default=999, show_default=True, help="Random divisions of the test."
)
@click.option("--size", callback=options.pixels, help="Height and width where the file leaves them open.")
@options.input_spec
@options.compute
@options.common
def compare_sets(**given: Any) -> int:
    """Say whether the image sets A and B are alike in MODEL's eyes: MMD with a p-value, distance of statistics.

    Example: mixmix data compare data/ images/ --model model.onnx
    """
    from converters.outputs import ensure_model

    ensure_model(given["model"])
    from converters.conversion import to_torch
    from converters.load import load_classifier
    from mixmix_cli.console import terminal_for
    from mixmix_cli.results import comparison_json, comparison_page
    from recipes.compare import compare
    from recipes.devices import choose_device
    from recipes.images import load_images

    terminal = terminal_for(given)
    device = choose_device(given["device"])
    classifier = load_classifier(given["model"], {**options.spec_from(given), "size": given["size"]})
    terminal.tell_choices(classifier)
    sets = [load_images(given[key], given["images"], size=classifier.spec.size) for key in ("a", "b")]
    module = to_torch(classifier).to(device)
    result = compare(module, sets[0], sets[1], permutations=given["permutations"], seed=given["seed"])
    if terminal.as_json:
        terminal.document(comparison_json(given["a"], given["b"], result))
    else:
        terminal.show(comparison_page(given["a"], given["b"], result))
    return 0

"""`mixmix validate REFERENCE CANDIDATE...`"""

from __future__ import annotations

from typing import Any

import click

from mixmix_cli import options


@click.command("validate")
@click.argument("reference", type=options.MODEL)
@click.argument("candidates", nargs=-1, required=True, type=options.MODEL)
@click.option("--data", required=True, type=options.IMAGES, help="Images: a folder, synth output or .npz.")
@click.option("-n", "--images", type=click.IntRange(min=1), help="Use N images only, evenly over folders of classes.")
@click.option("--layers", is_flag=True, help="Signal-to-noise ratio of every layer's output, what hurts most first.")
@click.option("--max-drop", type=options.FRACTION, help="Gate: top-1 may fall by this fraction.")
@click.option("--min-top1", type=options.FRACTION, help="Gate: least top-1, a fraction.")
@click.option("--min-agreement", type=options.FRACTION, help="Gate: least share of images with the reference's answer.")
@click.option("--junit", type=options.OUTPUT, help="Write the gates as a JUnit file.")
@click.option("--github", is_flag=True, help="Print GitHub annotations for failed gates.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).")
@click.option("--size", callback=options.pixels, help="Height and width where the file leaves them open.")
@options.input_spec
@options.force
@options.common
def command(**given: Any) -> int:
    """Run REFERENCE and each CANDIDATE through onnxruntime on the same images; exit status 1 when a gate fails.

    Example: mixmix validate model.onnx model.w4.onnx --data images/ --max-drop 0.01
    """
    from converters.outputs import ensure_model, ensure_writable

    for path in (given["reference"], *given["candidates"]):
        ensure_model(path)
    if given["junit"]:
        inputs = [given["reference"], *given["candidates"], given["data"]]
        ensure_writable(given["junit"], overwrite=given["force"], inputs=inputs)
    from converters.load import load_classifier
    from mixmix_cli.console import terminal_for
    from mixmix_cli.layers import layers_note, layers_table
    from mixmix_cli.phrases import LABELS, counted
    from mixmix_cli.results import show_failures, validation_json, validation_table
    from recipes.images import load_images
    from recipes.validate import Gates, validate

    terminal = terminal_for(given)
    spec = {**options.spec_from(given), "size": given["size"]}
    reference = load_classifier(given["reference"], spec)
    candidates = [load_classifier(path, spec) for path in given["candidates"]]
    terminal.tell_choices(reference)
    for other in candidates:
        terminal.tell_difference(other, reference)
    images = load_images(given["data"], given["images"], size=reference.spec.size)
    gates = Gates(given["max_drop"], given["min_top1"], given["min_agreement"])
    how = {"layers": given["layers"], "threads": given["threads"], "progress": terminal}
    result = validate(reference, candidates, images, gates, **how)
    if given["junit"]:
        from mixmix_cli.junit import write_junit

        write_junit(result, given["junit"])
    if terminal.as_json:
        terminal.document(validation_json(result))
    else:
        terminal.show(validation_table(result))
        terminal.show(f"{counted(result.images, 'image')} of {images.source}; {LABELS[result.labels]}")
        for candidate in result.candidates:
            show_failures(terminal, candidate)
            if candidate.layers is not None:
                terminal.show(layers_table(candidate, candidate.layers))
                terminal.show(layers_note(candidate.layers))
    if given["github"]:
        for candidate in result.candidates:
            for verdict in candidate.verdicts:
                if not verdict.passed:
                    reason = _on_one_line(f"{candidate.path}: {verdict.reason}")
                    terminal.annotate(f"::error title=mixmix {verdict.gate}::{reason}")
    return 0 if result.passed else 1


def _on_one_line(text: str) -> str:
    """As the CI server's commands want it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

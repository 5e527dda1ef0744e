"""`mixmix quantize MODEL --bits B`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixmix_cli import options

BITS = click.IntRange(2, 8)
METHODS = ("nearest", "adaround", "brecq", "qdrop")


@click.command("quantize", cls=options.CommandWithLists)
@click.argument("model", type=options.MODEL)
@click.option("--bits", required=True, type=BITS, help="Bits of the weights.")
@click.option("--act-bits", type=BITS, help="Bits of the activations; float when not given.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.w4.onnx beside the input.")
@click.option("--method", type=click.Choice(METHODS), default="qdrop", show_default=True, help="How to round.")
@options.smaller
@options.input_spec
@options.recipe(None, "quantization (overrides --method)")
@options.compute
@options.force
@options.common
def command(**given: Any) -> int:
    """Quantize MODEL to --bits bits. Without --data, images are made from --zoo, or from MODEL itself.

    Example: mixmix quantize --bits 4 model.onnx
    """
    from mixmix_cli.console import Terminal
    from mixmix_cli.requests import request_from, show_result
    from recipes.pipeline import compress, quantizing
    from recipes.quantize.engine import output_path
    from recipes.quantize.settings import PACKAGE, QuantizeSettings
    from recipes.settings import load_recipe

    terminal = Terminal(as_json=given["as_json"], quiet=given["quiet"], verbose=given["verbose"])
    recipe, bits, act_bits = given["recipe"] or given["method"], given["bits"], given["act_bits"]
    settings = load_recipe(QuantizeSettings, PACKAGE, recipe, given["effort"], given["overrides"])
    request = request_from(given, output_path(given["model"], bits, act_bits), recipe, terminal)
    result, validation = compress(request, quantizing(settings, bits, act_bits), terminal)
    kept = "; ".join(f"{layer.name} {layer.bits} bits ({layer.reason})" for layer in result.kept)
    account = f"{len(result.kept)} of {len(result.layers)} layers are not at {result.bits} bits: {kept or 'none'}"
    return show_result(terminal, result, validation, account)

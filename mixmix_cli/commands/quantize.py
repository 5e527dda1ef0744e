"""`mixmix quantize MODEL --bits B`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixmix_cli import options

if TYPE_CHECKING:
    from converters.targets import Target
    from recipes.budget import Budget
    from recipes.quantize.settings import QuantizeSettings
    from recipes.ranks import Ranks

METHODS = ("nearest", "adaround", "brecq", "qdrop", "qat")
CONTAINERS = ("int2", "int4", "int8")


def output_path(model: Path, bits: int | Budget, act_bits: int | None) -> Path:
    """`model.w4.onnx`, or `model.w4a8.onnx` with activation bits, beside the input; `model.mixed.onnx` by budget."""
    from converters.outputs import beside

    weights = f"w{bits}" if isinstance(bits, int) else "mixed"
    return beside(model, f"{weights}{'' if act_bits is None else f'a{act_bits}'}.onnx")


@click.command("quantize", cls=options.CommandWithLists)
@click.argument("model", type=options.MODEL)
@click.option("--bits", type=options.BITS, help="Bits of the weights, and more where it hurts most.")
@click.option(
    "--mixed",
    metavar="BUDGET",
    help="Instead of --bits: bits by layer within size=2MB (the file), bops=1.5G or bits=3 (on average).",
)
@options.act_bits
@options.target
@click.option(
    "--weight-container",
    type=click.Choice(CONTAINERS),
    help="Narrowest type that weights are stored in (default: int4, or what the target runs).",
)
@click.option("-o", "--output", type=options.OUTPUT, help="Default: MODEL.w4.onnx beside the input.")
@click.option("--method", type=click.Choice(METHODS), default="qdrop", show_default=True, help="How to round.")
@options.smaller
@options.input_spec
@options.recipe(None, "quantization (overrides --method)")
@options.compute
@options.force
@options.common
def command(**given: Any) -> int:
    """Quantize MODEL to --bits bits. Without --data, images are made from --zoo, or from MODEL itself.

    With several devices or machines, torchrun shares out the training of --method qat:
    torchrun --nproc-per-node 4 -m mixmix_cli quantize --bits 2 --act-bits 4 --method qat model.onnx

    Example: mixmix quantize --bits 4 model.onnx
    """
    if (given["bits"] is None) == (given["mixed"] is None):
        raise click.UsageError("give either --bits or --mixed: how many bits the weights get")
    from mixmix_cli.requests import refuse_early
    from recipes.budget import Budget

    act_bits = given["act_bits"]
    bits = given["bits"] if given["mixed"] is None else Budget.parse(given["mixed"])
    refuse_early(given, given["output"] or output_path(given["model"], bits, act_bits))

    from converters.targets import choose_target

    target = choose_target(given["target"], given["weight_container"], act_bits)

    from recipes.quantize.settings import PACKAGE, QuantizeSettings
    from recipes.settings import load_recipe

    given["recipe"] = given["recipe"] or given["method"]
    settings = load_recipe(QuantizeSettings, PACKAGE, given["recipe"], given["effort"], given["overrides"])

    from recipes.ranks import join_ranks

    with join_ranks(given["device"]) as ranks:
        return _quantize(ranks, given, bits, target, settings)


def _quantize(
    ranks: Ranks, given: dict[str, Any], bits: int | Budget, target: Target, settings: QuantizeSettings
) -> int:
    """What each process does; the first one alone says anything."""
    from mixmix_cli.console import terminal_for
    from mixmix_cli.requests import request_from, show_result, tell_storage
    from mixmix_cli.results import placement_line
    from recipes.pipeline import compress, quantizing

    act_bits = given["act_bits"]
    terminal = terminal_for(given, ranks)
    if given["bits"] is not None and given["weight_container"] is None:
        tell_storage(terminal, target, given["bits"], int2=act_bits is None)
    recipe = given["recipe"]
    if ranks.count > 1 and not settings.train_steps:
        raise click.UsageError(
            f"{recipe} is work for one process: start it without torchrun, or take --method qat, whose training is"
            " shared out"
        )
    request = request_from(given, output_path(given["model"], bits, act_bits), recipe, terminal, ranks=ranks)
    result, validation = compress(request, quantizing(settings, bits, act_bits, target), terminal)
    remedy = "give it more bits, or better images (--data, --zoo)"
    return ranks.lead(lambda: show_result(terminal, result, validation, placement_line(result), remedy))

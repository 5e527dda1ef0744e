"""`mixmix prune MODEL --sparsity S`"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from mixmix_cli import options

if TYPE_CHECKING:
    from recipes.account import Compression

METHODS = ("one-shot", "one-stage", "two-stage", "obs")


@click.command("prune", cls=options.CommandWithLists)
@click.argument("model", type=options.MODEL)
@click.option(
    "--sparsity",
    type=float,
    help="Share of the weights to remove, such as 0.5; with N:M, in as few layers as that takes.",
)
@click.option("--macs", type=float, help="With --pattern channel: the share of the multiplications to leave.")
@click.option(
    "--latency", type=float, help="With --pattern channel: the share of the time to leave, in onnxruntime and here."
)
@click.option("--pattern", default="unstructured", show_default=True, help="unstructured, channel, or N:M (2:4).")
@click.option("--bits", type=options.BITS, help="Then quantize what is left to this many bits, into one file.")
@options.act_bits
@options.target
@click.option("-o", "--output", type=options.OUTPUT, help="Default: MODEL.s50.onnx beside the input.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="obs",
    show_default=True,
    help="Which weights go, and what the others do.",
)
@options.smaller
@options.input_spec
@options.recipe(None, "pruning (overrides --method)")
@options.compute
@options.force
@options.common
def command(**given: Any) -> int:
    """Remove --sparsity of MODEL's weights. Without --data, images are made from --zoo, or from MODEL itself.

    --recipe, --set and --method are of pruning; --bits quantizes what is left by the recipe qdrop.

    Example: mixmix prune --sparsity 0.5 model.onnx
    """
    bits, act_bits = given["bits"], given["act_bits"]
    if bits is not None and given["latency"] is not None:
        raise click.UsageError("--latency is of the file without --bits, which change it: give --macs instead")
    if bits is None and (act_bits is not None or given["target"] != "portable"):
        raise click.UsageError("--act-bits and --target are for what --bits quantizes: give --bits too")
    from mixmix_cli.requests import refuse_early, request_from, show_result, tell_storage
    from recipes.prune.goal import make_goal, output_path

    goal = make_goal(given["pattern"], given["sparsity"], given["macs"], given["latency"])
    output = given["output"] or output_path(given["model"], goal, bits, act_bits)
    refuse_early(given, output)

    from converters.targets import choose_target

    target = choose_target(given["target"], None, act_bits)

    from recipes.prune.settings import PACKAGE, PruneSettings
    from recipes.quantize.settings import PACKAGE as QUANTIZE
    from recipes.quantize.settings import QuantizeSettings
    from recipes.settings import load_recipe

    recipe = given["recipe"] or given["method"]
    settings = load_recipe(PruneSettings, PACKAGE, recipe, given["effort"], given["overrides"])

    from mixmix_cli.console import terminal_for
    from mixmix_cli.results import placement_line
    from recipes.pipeline import compress, pruning, pruning_then_quantizing

    terminal = terminal_for(given)
    write = pruning(settings, goal)
    if bits is not None:
        tell_storage(terminal, target, bits)
        quantization = load_recipe(QuantizeSettings, QUANTIZE, "qdrop", given["effort"])
        write = pruning_then_quantizing(settings, goal, quantization, bits, act_bits, target)
    request = request_from(given, output, recipe, terminal)
    result, validation = compress(request, write, terminal)
    remedy = f"take less out of it, or teach it what it has lost (mixmix distill {given['model']} {result.output})"
    if bits is not None:
        remedy = "take less out of it, or give it more bits"
    account = _account(result)
    if bits is not None:
        account += f"\n{placement_line(result)}"
    elif given["pattern"] != "channel":
        account += "\nzeros make the file neither smaller nor faster in onnxruntime; --pattern channel does"
    return show_result(terminal, result, validation, account, remedy)


def _account(result: Compression) -> str:
    """How much is gone, and which layers gave most and least."""
    from mixmix_cli.phrases import percent

    ordered = sorted(result.layers, key=lambda layer: layer.sparsity)
    least, most = ordered[0], ordered[-1]
    text = (
        f"{percent(result.sparsity)} of the weights of {len(result.layers)} layers are"
        f" {'gone' if result.macs_left < 1 else 'zero'}: from"
        f" {percent(least.sparsity)} ({least.name}) to {percent(most.sparsity)} ({most.name})"
    )
    if result.macs_left < 1:
        text += f", and {percent(1 - result.macs_left)} of the multiplications"
    whole = Counter(layer.whole for layer in result.layers if layer.whole is not None)
    reasons = "; ".join(f"{count}: {reason}" for reason, count in whole.most_common())
    return text + (f"; {whole.total()} stay as they are ({reasons})" if whole else "")

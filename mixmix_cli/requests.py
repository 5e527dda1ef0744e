"""What `quantize` and `prune` have in common: from what was typed to a request, and from a result to the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixmix_cli import __version__, options
from mixmix_cli.console import Terminal
from mixmix_cli.layers import show_worst_layers
from mixmix_cli.phrases import counted, percent, size
from mixmix_cli.results import compression_json, fusion_line, show_failures, slower_because, validation_table

if TYPE_CHECKING:
    from converters.targets import Target
    from recipes.account import Compression
    from recipes.pipeline import Request
    from recipes.ranks import Ranks
    from recipes.validate import Validation


LOW = 0.5
"""Agreement, or top-1 as a share of the reference's, below which something is said of it."""


def refuse_early(given: dict[str, Any], output: Path | None) -> None:
    """Say what cannot work before torch is imported, which takes seconds. `output` is None where it depends on more."""
    from recipes.refusals import check_compression
    from recipes.synth.settings import load_synth_recipe

    if given["zoo"] and given["data"] is not None:
        raise click.UsageError("--zoo makes images, and --data gives them: leave one out")
    if given["synth_recipe"] is not None and given["data"] is not None:
        raise click.UsageError("--synth-recipe is for images that are made, and --data gives them: leave one out")
    models = [given["model"], *given["zoo"], *([given["student"]] if "student" in given else [])]
    check_compression(models, output, given["data"], given["max_drop"], overwrite=given["force"])
    if given["synth_recipe"] is not None:
        load_synth_recipe(given["synth_recipe"], given["effort"], (), None, {})


def request_from(
    given: dict[str, Any],
    output: Path,
    recipe: str,
    terminal: Terminal,
    *,
    student: Path | None = None,
    ranks: Ranks | None = None,
) -> Request:
    """Loads the models and says what had to be judged of them. Takes the input-spec options out of `given`."""
    from converters.load import load_classifier
    from recipes.devices import choose_device
    from recipes.pipeline import Request
    from recipes.ranks import ALONE
    from recipes.validate import Gates

    device = choose_device(given["device"])
    spec = {**options.spec_from(given), "size": given["size"]}
    classifier = load_classifier(given["model"], spec)
    taught = None if student is None else load_classifier(student, spec)
    zoo = [load_classifier(path, open_size=classifier.spec.size) for path in given["zoo"]]
    for model in (classifier, *([] if taught is None else [taught]), *zoo):
        terminal.tell_choices(model)
    return Request(
        classifier=classifier,
        zoo=zoo,
        data=given["data"],
        output=given["output"] or output,
        recipe=recipe,
        synth_recipe=given["synth_recipe"],
        effort=given["effort"],
        images=given["images"],
        gates=Gates(max_drop=given["max_drop"]),
        seed=given["seed"],
        device=device,
        overwrite=given["force"],
        version=__version__,
        student=taught,
        ranks=ranks or ALONE,
    )


def tell_storage(terminal: Terminal, target: Target, bits: int, *, int2: bool = False) -> None:
    """Say where weights take the room of more bits than they have; `int2`: whether 2 bits can be had in 2."""
    stored = target.weight_container(bits).bits
    if bits <= 4 and bits < stored:
        narrower = " (in 2 with --weight-container int2)" * (int2 and bits == 2)
        terminal.say(
            f"{bits}-bit weights are stored in {stored} bits for {target.name}{narrower}: the file is as large as with"
            f" --bits {stored}"
        )


def show_result(terminal: Terminal, result: Compression, validation: Validation, account: str, remedy: str) -> int:
    """Prints what came of it, `account` of the layers in the middle; the exit status.

    `remedy` is what can be done about a file that answers otherwise than its reference.
    """
    if terminal.as_json:
        terminal.document(compression_json(result, validation))
    else:
        terminal.show(
            f"{result.output}: {size(result.size_before)} -> {size(result.size_after)}"
            f" (1/{result.size_before / result.size_after:.1f}) in {result.seconds:.0f} s"
        )
        terminal.show(account)
        if result.fusion is not None and (result.fusion.counted or result.fusion.forecast):
            terminal.show(fusion_line(result.fusion))
        show_worst_layers(terminal, validation.candidates[0])
        terminal.show(validation_table(validation))
        terminal.show(
            f"on the {counted(validation.images, 'image')} that it was fitted to, which flatters it:"
            " hold it against others with mixmix validate"
        )
        show_failures(terminal, validation.candidates[0])
    (candidate,) = validation.candidates
    kept = candidate.agreement
    if candidate.top1 is not None and validation.reference.top1:
        kept = candidate.top1 / validation.reference.top1
    if kept < LOW:
        terminal.say(
            f"{result.output} agrees with {validation.reference.path} on only {percent(candidate.agreement)} of the"
            f" images: {remedy}"
        )
    for before in validation.beside:
        if candidate.kl > before.kl:
            terminal.say(
                f"{result.output} is farther from its teacher than {before.path} was (KL {candidate.kl:.4f},"
                f" {before.kl:.4f} before): {remedy}, or leave its BatchNorm as it is (--set statistics=false)"
            )
    if result.runs_elsewhere:
        terminal.say(f"latency is that of onnxruntime on this machine's processor, and not of {result.target}")
    reason = slower_because(result, validation)
    if reason is not None:
        latency = candidate.latency_ms / validation.reference.latency_ms
        terminal.say(f"the file is {latency:.1f} times as slow as the float one here: {reason}")
    return 0 if validation.passed else 1

"""Options that commands share."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])

MODEL = click.Path(path_type=Path)


class ImagesPath(click.Path):
    """Where images are; where none can be, that is said before anything heavy is imported."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from recipes.refusals import check_source

        path = cast("Path", super().convert(value, param, ctx))
        check_source(path)
        return path


IMAGES = ImagesPath(path_type=Path)


class OutputPath(click.Path):
    """A file to write."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).endswith(os.sep):
            self.fail(f"{value} names a folder: name a file", param, ctx)
        return super().convert(value, param, ctx)


OUTPUT = OutputPath(path_type=Path)


class Fraction(click.FloatRange):
    """A number from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not a number from 0 to 1", param, ctx)
        return found


FRACTION = Fraction()
SEED = click.IntRange(min=0, max=2**63 - 1)
"""What every generator of random numbers takes."""

BITS = click.IntRange(2, 8)
WIDE = 16
TARGETS = ("portable", "ort-cpu", "ort-cuda", "tensorrt")


class ActivationBits(click.ParamType):  # type: ignore[type-arg]  # click's older releases take none
    """2 to 8, or 16."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) not in {str(bits) for bits in (*range(2, 9), WIDE)}:
            self.fail(f"{value!r} is not 2 to 8, or {WIDE}", param, ctx)
        return int(value)


def _apply(function: F, decorators: list[Callable[[F], F]]) -> F:
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def _quiet(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    return _one_of_two(value, context.params.get("verbose", False))


def _verbose(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    if not value and not context.resilient_parsing:
        warnings.simplefilter("ignore")  # libraries' remarks to developers
    return _one_of_two(value, context.params.get("quiet", False))


def _one_of_two(value: bool, other: bool) -> bool:
    if value and other:
        raise click.UsageError("give -q or -v, not both")
    return value


def common(function: F) -> F:
    """--json, -q, -v, --traceback."""
    return _apply(
        function,
        [
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else."),
            click.option(
                "-q", "--quiet", is_flag=True, callback=_quiet, help="No progress and no messages, only results."
            ),
            click.option("-v", "--verbose", is_flag=True, callback=_verbose, help="More detail on stderr."),
            click.option("--traceback", is_flag=True, help="Show the traceback of an error."),
        ],
    )


def device(_context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda or cuda:N", param=parameter)
    return value


seed = click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of all chance.")


def compute(function: F) -> F:
    """--device, --seed."""
    return _apply(
        function,
        [
            click.option(
                "--device", default="auto", show_default=True, callback=device, help="auto, cpu, cuda or cuda:N."
            ),
            seed,
        ],
    )


def recipe(default: str | None, what: str) -> Callable[[F], F]:
    """--recipe, --set, --effort."""
    return lambda function: _apply(
        function,
        [
            click.option(
                "--recipe", default=default, show_default=True, help=f"Recipe of {what}: a name or FILE.toml."
            ),
            click.option(
                "--set",
                "overrides",
                multiple=True,
                metavar="KEY=VALUE",
                help="Override one key of the recipe: `mixmix recipe show` lists them.",
            ),
            click.option(
                "--effort",
                type=click.Choice(["fast", "default", "paper"]),
                default="default",
                show_default=True,
                help="Step budget; paper: with the paper's settings where the recipe has them.",
            ),
        ],
    )


class ListOption(click.Option):
    """An option that may be repeated, and takes several values at once too (`CommandWithLists`)."""


class CommandWithLists(click.Command):
    """A command whose list options take what a shell makes of `models/*.onnx`.

    `--zoo a.onnx b.onnx` is `--zoo a.onnx --zoo b.onnx`; where words are missing for the arguments, the last ones are
    those.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._spread(args))

    def _spread(self, words: list[str]) -> list[str]:
        options = {name: p for p in self.params if isinstance(p, click.Option) for name in p.opts}
        spread: list[str] = []
        listing: str | None = None  # the list option whose values are being read
        repeated: list[int] = []  # where it was
        missing = sum(isinstance(p, click.Argument) for p in self.params)
        owed = False
        for word in words:
            if word.startswith("-") and not owed:
                option = options.get(_last_option(word, options))
                owed = option is not None and not option.is_flag
                listing = word if isinstance(option, ListOption) else None
            elif listing and not owed:
                repeated.append(len(spread))
                spread.append(listing)
            else:
                missing, owed = missing - (not owed), False
            spread.append(word)
        for place in reversed(repeated[-missing:] if missing > 0 else []):
            del spread[place]
        return spread


def _last_option(word: str, options: dict[str, click.Option]) -> str:
    """Which option the next word is for: `-n` in `-qn`, and none where the value stands in the word, as in `-n4`."""
    if word.startswith("--") or word in options:
        return word
    for index, letter in enumerate(word[1:], 2):
        option = options.get(f"-{letter}")
        if option is None or not option.is_flag:
            return f"-{letter}" if index == len(word) else ""
    return ""


def smaller(function: F) -> F:
    """What every command that writes a smaller model takes, gathered by `requests.request_from`."""
    return _apply(
        function,
        [
            click.option("--data", type=IMAGES, help="Images to calibrate on (folder, synth output or .npz)."),
            click.option(
                "--zoo",
                cls=ListOption,
                multiple=True,
                type=MODEL,
                metavar="MODELS",
                help="Models to make images from when there is no --data; what the command works on may come last.",
            ),
            click.option("-n", "--images", type=click.IntRange(min=1), help="Use or make this many images."),
            click.option(
                "--max-drop",
                type=FRACTION,
                help="Exit with status 1 when top-1 falls by more than this fraction.",
            ),
            click.option(
                "--size", callback=pixels, help="The model's height and width where the file leaves them open."
            ),
            click.option("--synth-recipe", help="Recipe of the images that are made (default: what fits the models)."),
        ],
    )


act_bits = click.option(
    "--act-bits",
    type=ActivationBits(),
    help="Bits of the activations, 2 to 8 or 16, and more where it hurts most; float when not given.",
)

target = click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="portable",
    show_default=True,
    help="Runtime that the file is for: ort-cpu runs 8-bit activations in integers.",
)

force = click.option("--force", is_flag=True, help="Replace what exists.")


def numbers(_context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    """`0.5` or `0.485,0.456,0.406`."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a comma-separated list of numbers", param=parameter) from None


def pixels(_context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`224` or `224x192` (height x width)."""
    if value is None:
        return None
    parts = value.lower().split("x")
    try:
        height, width = (int(part) for part in (parts * 2 if len(parts) == 1 else parts))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise click.BadParameter(f"{value!r} is not a size such as 224 or 224x192", param=parameter)
    return height, width


def image_channels(_context: click.Context, parameter: click.Parameter, value: str | None) -> str | int | None:
    """`rgb`, `bgr`, `gray`, or how many."""
    if value is None or value in ("rgb", "bgr", "gray"):
        return value
    if re.fullmatch("[0-9]{1,9}", value) and int(value):
        return int(value)
    raise click.BadParameter(f"{value!r} is not rgb, bgr, gray, or a number of channels", param=parameter)


def input_spec(function: F) -> F:
    """Input-spec keys, gathered by `spec_from`."""
    return _apply(
        function,
        [
            click.option("--mean", callback=numbers, help="Input mean a channel, such as 0.485,0.456,0.406."),
            click.option("--std", callback=numbers, help="Input standard deviation a channel."),
            click.option("--scale", type=float, help="What pixel value 1.0 becomes before mean and std: 1 or 255."),
            click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Order of the input's dimensions."),
            click.option("--channels", callback=image_channels, help="rgb, bgr, gray, or a number."),
        ],
    )


def spec_from(values: dict[str, Any]) -> dict[str, Any]:
    """Take the input-spec options out of a command's keyword arguments."""
    spec = {key: values.pop(key, None) for key in ("mean", "std", "scale", "layout", "channels")}
    return {key: value for key, value in spec.items() if value is not None}

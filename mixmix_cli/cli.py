"""The command group. A command's module is imported when it is called, so that --help answers at once."""

from __future__ import annotations

import importlib
import os

import click

from mixmix_cli import __version__

COMMANDS = {
    "demo": "Run the whole job on the embedded zoo: images from models, low-bit and sparse files, one table.",
    "inspect": "Say what a model is and what can be done with it.",
    "synth": "Make calibration images from models alone.",
    "quantize": "Write a smaller model with low-bit weights (and activations).",
    "prune": "Write a model with fewer weights: zeros, or whole channels gone.",
    "distill": "Teach one model what another knows.",
    "data": "Hand image sets to other tools, and compare them.",
    "zoo": "Show the paper's model zoos, and export them from an installed library.",
    "recipe": "List the recipes, and show every key that --set can change.",
    "validate": "Hold candidates against a reference through onnxruntime, with gates for CI.",
    "report": "Write one page of images, accuracy, gates and error by layer, for people.",
}

SHARED_OUT = ("synth", "quantize", "distill")
"""Commands that several processes, started by torchrun, work on together."""


class LazyGroup(click.Group):
    """Knows its commands by name and one line each; imports `mixmix_cli.commands.NAME` only to run one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"mixmix_cli.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mixmix")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compress ONNX image classifiers without their training data.

    \b
    mixmix synth models/*.onnx -o data/
    mixmix quantize --bits 4 model.onnx --data data/
    mixmix prune --sparsity 0.5 model.onnx --data data/
    mixmix validate model.onnx model.w4.onnx --data images/ --min-agreement 0.9
    """
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if started_by_torchrun and os.environ["WORLD_SIZE"] != "1" and context.invoked_subcommand not in SHARED_OUT:
        raise click.UsageError(
            f"{context.invoked_subcommand} is work for one process: start it without torchrun, which is for"
            f" {', '.join(SHARED_OUT[:-1])} and {SHARED_OUT[-1]}"
        )

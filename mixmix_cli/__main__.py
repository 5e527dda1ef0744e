"""Entry point: `mixmix` and `python -m mixmix_cli`. Turns every failure into one sentence and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable

import click

from mixmix_cli.cli import cli
from mixmix_cli.pipes import while_read

FEWER_AT_ONCE = {"synth": "--batch 8"} | dict.fromkeys(("quantize", "prune", "distill"), "--set batch=8")
"""Commands whose memory is that of a batch, and how to make it smaller."""
DONE, GATE_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status as in the contract: 0, 1 gate failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not {"-v", "--verbose"} & set(arguments):
        warnings.simplefilter("ignore")  # libraries' remarks to developers
    try:
        result = cli.main(arguments, prog_name="mixmix", standalone_mode=False)
        return int(result or DONE)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except SystemExit:  # click's, when nobody reads what it prints: `mixmix --help | true`
        return DONE
    except click.ClickException as error:
        _say_once(error.show)
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        message = "interrupted: what was finished, if anything, is kept"
        _say_once(lambda: click.echo(message, err=True))
        return INTERRUPTED
    except Exception as error:  # the last line of defence: a sentence, never a traceback
        sentence = (traceback.format_exc() if "--traceback" in arguments else "") + _sentence(error, arguments)
        _say_once(lambda: click.echo(sentence, err=True))
        return BAD_INPUT


def _say_once(say: Callable[[], None]) -> None:
    """Call `say`; of the processes that torchrun has started, in one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        with while_read(sys.stderr):
            say()
        return
    from recipes.ranks import say_once

    say_once(say)


def _sentence(error: Exception, arguments: list[str]) -> str:
    from converters.errors import MixMixError

    if isinstance(error, MixMixError):
        return f"Error: {error}"
    memory = _exhausted(error)
    if memory is not None:
        fewer = next((how for command, how in FEWER_AT_ONCE.items() if command in arguments), None)
        remedy = f"take fewer images at once ({fewer})" if fewer else "free some"
        return f"Error: the {memory} has too little memory left: {remedy}, or use another machine or --device"
    return f"Error: unexpected {type(error).__name__}: {error} (--traceback shows where; please report it)"


def _exhausted(error: Exception) -> str | None:
    """Whose memory an error says is used up; None for other errors. torch has a type of its own for GPUs alone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in kinds:
        return "GPU"
    return "machine" if "MemoryError" in kinds or "can't allocate memory" in str(error) else None


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()

"""Entry point: `mixmix` and `python -m mixmix_cli`. Turns every failure into one sentence and an exit status."""

from __future__ import annotations

import sys
import traceback
import warnings

import click

from mixmix_cli.cli import cli

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
    except click.ClickException as error:
        error.show()
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: what was finished is kept, and the same command goes on from there", err=True)
        return INTERRUPTED
    except Exception as error:  # the last line of defence: a sentence, never a traceback
        if "--traceback" in arguments:
            traceback.print_exc()
        click.echo(_sentence(error), err=True)
        return BAD_INPUT


def _sentence(error: Exception) -> str:
    from converters.errors import MixMixError

    if isinstance(error, MixMixError):
        return f"Error: {error}"
    return f"Error: unexpected {type(error).__name__}: {error} (--traceback shows where; please report it)"


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()

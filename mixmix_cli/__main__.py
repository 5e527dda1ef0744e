"""Entry point: `mixmix` and `python -m mixmix_cli`. Turns every failure into one sentence and an exit status."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable

import click

from mixmix_cli.cli import cli
from mixmix_cli.pipes import while_read

TRAINED = "--set batch=8; --set train_batch=8 for qat; images that it makes itself: mixmix synth --batch 8 before"
FEWER_AT_ONCE = {"synth": "--batch 8 or fewer"} | dict.fromkeys(("quantize", "prune", "distill"), TRAINED)
"""How to make the batch smaller, by command; others hold what they were given."""
EXHAUSTED = ("allocate memory", "out of memory", "bad_alloc", "bad allocation", "not enough memory")
"""What torch's allocators, CUDA and onnxruntime say in errors of no type of their own."""
DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status as in the contract: 0, 1 gate failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
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

    memory = _exhausted(error)
    if memory is not None:
        fewer = FEWER_AT_ONCE.get(arguments[0])
        remedy = f"take fewer images at once ({fewer}), or another --device" if fewer else "free some"
        return f"Error: the {memory} has too little memory left: {remedy}"
    if isinstance(error, MixMixError):
        return f"Error: {error}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"Error: {error.filename} cannot be used ({error.strerror}): check the path, and who may use it"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"Error: output cannot be written ({error.strerror}): free some, or send it elsewhere"
    return f"Error: unexpected {type(error).__name__}: {error} (--traceback shows where; please report it)"


def _exhausted(error: BaseException | None) -> str | None:
    """Whose memory is used up, by an error or by what it comes from; None for other errors."""
    from converters.errors import MixMixError

    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        text = "" if isinstance(error, MixMixError) else str(error)  # which may name a file so
        if "OutOfMemoryError" in kinds or "CUDA error: out of memory" in text:
            return "GPU"
        if "MemoryError" in kinds or any(words in text for words in EXHAUSTED):
            return "machine"
        error = error.__cause__
    return None


def run() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's letters cannot spell is no error
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    run()

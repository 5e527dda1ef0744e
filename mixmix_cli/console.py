"""What a person sees: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from mixmix_cli.phrases import pixels
from mixmix_cli.pipes import hush, while_read

if TYPE_CHECKING:
    from converters.classifier import Classifier
    from recipes.ranks import Ranks


FILE_WIDTH = 200
"""Columns of what goes to a file or a pipe, where nothing has to be broken."""
LEAST_WIDTH = 20
"""Columns of a terminal that says the truth about itself."""

WIDE = 100
"""Columns of a terminal that has room for a bar beside everything else."""


class _Printer(Console):
    """Rich ends the program where nobody reads on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        hush(self.file)


class Terminal:
    """The one place that prints. Also the recipes' `Progress`."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose
        self.errors = _Printer(stderr=True, highlight=False, emoji=False)
        self.on_screen = sys.stdout is not None and sys.stdout.isatty()  # colours may be forced
        plain = None if self.on_screen else False
        self.results = _Printer(highlight=False, emoji=False, soft_wrap=True, force_terminal=plain)
        if self.results.width < LEAST_WIDTH or not (self.on_screen or "COLUMNS" in os.environ):
            self.results.width = FILE_WIDTH
        self._bars: Progress | None = None
        self._warn_of_installation()

    def _warn_of_installation(self) -> None:
        from converters.runtime import installation_conflict

        conflict = installation_conflict()
        if conflict is not None:
            self.say(f"warning: {conflict}")

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[_Bar]:
        """A progress bar with time left, under that of the task that it is a part of; nothing where nobody looks."""
        if self._bars is not None:
            part = self._bars.add_task(name, total=total, note="")
            try:
                yield _Bar(self._bars, part)
            finally:
                self._bars.remove_task(part)
            return
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=_whole()),
            BarColumn(bar_width=24 if self.errors.width >= WIDE else 8, table_column=_whole()),
            MofNCompleteColumn(table_column=_whole()),
            TimeElapsedColumn(table_column=_whole()),
            TimeRemainingColumn(elapsed_when_finished=False, table_column=_whole()),
            TextColumn(
                "{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            console=self.errors,
            expand=True,
            transient=not self.verbose,
            disable=self.quiet or not self.errors.file.isatty(),
        )
        try:
            with self._bars as bars:
                yield _Bar(bars, bars.add_task(name, total=total, note=""))
        finally:
            self._bars = None

    def say(self, message: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            self.errors.print(message, markup=False, soft_wrap=True)

    def tell_choices(self, classifier: Classifier) -> None:
        """Say what was not in the file and had to be judged or assumed."""
        spec, detection, path = classifier.spec, classifier.detection, classifier.path
        for note in classifier.notes:
            self.say(f"{path}: {note}")
        if spec.source == "detected" and detection is not None:
            self.say(
                f"{path} does not say how it takes pixels; found: {pixels(spec)}"
                f" (confidence {detection.confidence:.2f}; mixmix inspect shows why)"
            )
        elif spec.source == "assumed":
            height, width = spec.size
            self.say(
                f"warning: {path} does not say how it takes pixels; assuming {height}x{width} {spec.channels},"
                f" {pixels(spec)}: set --mean, --std and --scale if that is wrong"
            )

    def tell_difference(self, candidate: Classifier, reference: Classifier) -> None:
        """Say of a candidate that takes pixels otherwise than the reference that it is given them so."""
        from recipes.validate import spec_beside

        here, there = (
            (spec.size, spec.channels, pixels(spec)) for spec in (spec_beside(candidate, reference), reference.spec)
        )
        if here != there:
            (height, width), channels, arithmetic = here
            source = candidate.spec.source
            known = f" ({source})" if source in ("assumed", "detected") else ", as it says"
            self.say(
                f"{candidate.path} is given images otherwise than {reference.path}: {height}x{width} {channels},"
                f" {arithmetic}{known}"
            )

    def annotate(self, line: str) -> None:
        """A line for the CI server's log, whatever the verbosity."""
        with while_read(sys.stderr):
            click.echo(line, err=True)

    def document(self, value: Any) -> None:
        """The JSON result."""
        with while_read(sys.stdout):
            click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))

    def show(self, content: Table | str) -> None:
        """A result for people, on stdout."""
        if isinstance(content, str):
            self.results.print(content, markup=False)
        elif self.on_screen:
            self.results.print(content)
        else:  # a file needs no blanks up to the width of a terminal
            with self.results.capture() as captured:
                self.results.print(content)
            lines = "\n".join(line.rstrip() for line in captured.get().splitlines())
            self.results.print(lines, markup=False)


def terminal_for(given: dict[str, Any], ranks: Ranks | None = None) -> Terminal:
    """The terminal as the user wants it; of several processes, the first one alone says anything."""
    heard = ranks is None or ranks.leads
    return Terminal(as_json=given["as_json"], quiet=given["quiet"] or not heard, verbose=given["verbose"] and heard)


def _whole() -> Column:
    """What is shown whole where there is no room for everything: the note gives way."""
    return Column(no_wrap=True)


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        if note is None:
            self._bar.update(self._task, advance=steps)
        else:
            self._bar.update(self._task, advance=steps, note=note)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, texts: Sequence[str] = ()
) -> Table:
    """A table whose first column and those named in `texts` are text, and whose others are figures."""
    built = Table(title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    built.title = None if title is None else Text(title, "table.title")
    for index, column in enumerate(columns):
        built.add_column(column, justify="left" if index == 0 or column in texts else "right", overflow="fold")
    for row in rows:
        built.add_row(*map(Text, row))  # brackets in names are no markup
    return built


def _plain(value: Any) -> Any:
    """JSON types only; numbers that JSON does not have become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

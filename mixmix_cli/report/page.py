"""The page: what it is made of, and its text from the template. Knows nothing of models."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mixmix_cli import __version__
from mixmix_cli.phrases import percent, size
from mixmix_cli.report.documents import Source, clean

if TYPE_CHECKING:
    from recipes.records import Sheet

NOTHING = "–"
NAMED = 4
"""Names that are told where there are many."""
Mark = Literal["", "good", "bad", "open"]


@dataclass(frozen=True)
class Cell:
    """What is shown; for a figure also the exact number, which the page keeps."""

    text: str
    value: float | None = None
    mark: Mark = ""


@dataclass(frozen=True)
class Column:
    """A column of a table; figures stand on the right."""

    name: str
    figures: bool = True


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False
    """Long, and of second importance: shown when it is asked for."""
    kind: str = "table"


@dataclass(frozen=True)
class Facts:
    """One fact a row, with its name."""

    rows: Sequence[tuple[str, Cell]]
    kind: str = "facts"


@dataclass(frozen=True)
class Note:
    text: str
    mark: Mark = ""
    kind: str = "note"


@dataclass(frozen=True)
class Drawing:
    """A plot as SVG that is safe to stand in a page."""

    svg: Markup
    caption: str
    kind: str = "drawing"


@dataclass(frozen=True)
class Picture:
    sheet: Sheet
    caption: str
    kind: str = "picture"

    @property
    def uri(self) -> str:
        return f"data:{self.sheet.media};base64,{b64encode(self.sheet.content).decode()}"


Block = Table | Facts | Note | Drawing | Picture


@dataclass(frozen=True)
class Section:
    """What one input comes to. `names` are what the page is about."""

    kind: str
    title: str
    source: str
    blocks: list[Block]
    names: list[str] = field(default_factory=list)
    digest: str | None = None


def render(title: str, summary: Sequence[Block], sections: Sequence[Section]) -> str:
    """The whole page."""
    loader = PackageLoader("mixmix_cli", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html")
    return template.render(title=title, summary=summary, sections=sections, version=__version__)


def text(content: object, mark: Mark = "") -> Cell:
    shown = NOTHING if content is None or content == "" else clean(str(content))
    return Cell(shown, mark=mark)


def number(value: float | None, form: str = ",", unit: str = "") -> Cell:
    return Cell(NOTHING) if value is None else Cell(format(value, form) + unit, value)


def share(value: float | None) -> Cell:
    """A fraction, shown in per cent."""
    return Cell(NOTHING) if value is None else Cell(percent(value), value)


def size_cell(value: int) -> Cell:
    return Cell(size(value), value)


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = names if len(names) <= NAMED + 1 else [*names[:NAMED], f"{len(names) - NAMED} more"]
    return ", ".join(shown)


def name_of(path: str) -> str:
    """The last part of a path of any system."""
    return clean(re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path)


def of_all(shown: int, count: int) -> str:
    return f" {shown} of {count} are drawn; the table has all." if shown < count else ""


def text_columns(*names: str) -> list[Column]:
    return [Column(name, False) for name in names]


def make_section(source: Source, kind: str, title: str, blocks: Iterable[Block], names: list[str]) -> Section:
    return Section(kind, title, clean(str(source.path)), list(blocks), names, source.digest)

"""A report as a browser sees it, for the tests of `mixmix report`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "img", "br", "hr", "link", "input"}

NAMES = ("synth", "quantize", "brecq", "prune", "distill", "validate", "pass", "inspect", "compare")


@dataclass
class Shown:
    """One cell: its text, and the exact figure behind it."""

    text: str = ""
    value: float | None = None


@dataclass
class Grid:
    """A table, or one of facts."""

    section: str
    caption: str
    rows: list[list[Shown]] = field(default_factory=list)

    def column(self, name: str) -> list[Shown]:
        place = [cell.text for cell in self.rows[0]].index(name)
        return [row[place] for row in self.rows[1:]]

    def fact(self, name: str) -> Shown:
        return next(row[1] for row in self.rows if row[0].text == name)


class Page(HTMLParser):
    """A page as a browser sees it. Fails where elements are not closed in the order they were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.grids: list[Grid] = []
        self.labels: list[str] = []
        self.texts: dict[str, str] = {"h2": "", "figcaption": "", "summary": ""}
        self.title, self.text = "", ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag] = ""
        if tag == "table":
            caption = self.texts["summary"] if "details" in self.open else self.texts["figcaption"]
            self.grids.append(Grid(self.texts["h2"], caption))
        elif tag == "tr":
            self.grids[-1].rows.append([])
        elif tag in ("td", "th"):
            self.grids[-1].rows[-1].append(Shown())
        elif tag == "data":
            self.grids[-1].rows[-1][-1].value = float(str(given["value"]))
        elif tag == "text":
            self.labels.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        inside = set(self.open)
        if inside & {"td", "th"}:
            self.grids[-1].rows[-1][-1].text += data
        for tag in inside & self.texts.keys():
            self.texts[tag] += data
        if "title" in inside:
            self.title += data
        if "text" in inside:
            self.labels[-1] += data

    def grid(self, section: str, caption: str) -> Grid:
        return next(grid for grid in self.grids if section in grid.section and caption in grid.caption)

    def facts(self, section: str) -> Grid:
        return next(grid for grid in self.grids if section in grid.section)


def load(made: Path, name: str) -> Any:
    return json.loads((made / f"{name}.json").read_text())

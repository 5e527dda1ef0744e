"""Plots as inline SVG: text stays text, ink and paper are the page's own, and kinds are told apart by form.

matplotlib draws with stand-in colours, which become the page's CSS variables, so that a plot is dark where the page is.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from mixmix_cli.report.documents import clean

COLOURS = {"#010101": "var(--ink)", "#fefefe": "var(--paper)", "#808081": "var(--faint)", "#0000f1": "var(--accent)"}
INK, PAPER, FAINT, ACCENT = COLOURS
MOST_BARS = 40
"""What one can take in; the table has all."""
LONGEST = 44
"""Letters of a name; the end tells more than the beginning."""
WIDTH = 7.6
MARKERS = "os^Dv<>pPX"
DASHES = ("-", "--", ":", "-.")
RANGE = 30.0
"""Largest over smallest value from which an axis is logarithmic."""

_STYLE: Any = {  # matplotlib's types list every setting by name
    "svg.fonttype": "none",
    "svg.hashsalt": "mixmix",  # the same data: the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "axes.formatter.use_mathtext": False,
}


def bars(names: Sequence[str], values: Sequence[float], labels: Sequence[str], axis: str, what: str) -> Markup:
    """Horizontal bars, one a name, from above, with their values beside them. `what` is said to who cannot see it."""
    with _figure(0.24 * len(names) + 0.7) as (figure, axes):
        places = range(len(names))
        axes.barh(places, values, 0.62, color=ACCENT)
        _beside(axes, places, values, labels)
        _names(axes, names)
        axes.set_xlabel(axis)
        axes.axvline(0, color=FAINT, linewidth=0.8)
    return _inline(figure, what)


def pairs(
    names: Sequence[str],
    first: Sequence[float],
    second: Sequence[float],
    titles: tuple[str, str],
    form: str,
    axis: str,
    what: str,
) -> Markup:
    """Two horizontal bars a name: an outline and a full one."""
    with _figure(0.42 * len(names) + 1.0) as (figure, axes):
        above, below = ([place + shift for place in range(len(names))] for shift in (-0.2, 0.2))
        axes.barh(above, first, 0.34, facecolor=PAPER, edgecolor=ACCENT, label=titles[0])
        axes.barh(below, second, 0.34, facecolor=ACCENT, edgecolor=ACCENT, label=titles[1])
        for places, values in ((above, first), (below, second)):
            _beside(axes, places, values, [format(value, form) for value in values])
        _names(axes, names)
        axes.set_xlabel(axis)
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return _inline(figure, what)


def lines(series: Mapping[str, Mapping[int, float]], across: str, up: str, what: str) -> Markup:
    """Points over whole numbers, joined where they are many: one form of line and point for each name."""
    with _figure(2.6 + 0.17 * len(series)) as (figure, axes):
        for index, (name, points) in enumerate(series.items()):
            axes.plot(
                list(points),
                list(points.values()),
                color=ACCENT if index % 2 else INK,
                linestyle=DASHES[index % len(DASHES)],
                linewidth=1,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                markerfacecolor=PAPER,
                label=f" {_short(name)}",  # a leading underscore would hide it
            )
        values = [value for points in series.values() for value in points.values()]
        if min(values) > 0 and max(values) > RANGE * min(values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, *values))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2, borderaxespad=0)
        for entry in legend.get_texts():
            entry.set_parse_math(False)
    return _inline(figure, what)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure in our style, whatever the user's own settings of matplotlib are."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # remarks on its font cache
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure((WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= LONGEST else f"…{name[-LONGEST:]}"


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a $ in a name is a $
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.spines["left"].set_visible(False)


def _beside(axes: Axes, places: Sequence[float], values: Sequence[float], labels: Sequence[str]) -> None:
    """Labels at the ends of bars, on the far side from zero."""
    for place, value, label in zip(places, values, labels, strict=True):
        side = -1 if value < 0 else 1
        shift = ScaledTranslation(side * 4 / 72, 0, axes.figure.dpi_scale_trans)
        axes.text(
            value,
            place,
            label,
            transform=axes.transData + shift,
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
            parse_math=False,
        )


def _inline(figure: Figure, what: str) -> Markup:
    """The figure as an element of an HTML page: no header, no namespace, no style of its own, no identifiers twice."""
    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that DejaVu lacks: the reader's fonts have them
        matplotlib.rcParams.update(_STYLE)
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    prefix = f"p{sha256(buffer.getvalue().encode()).hexdigest()[:8]}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        element.tag = element.tag.partition("}")[2] or element.tag
        attributes = {key.partition("}")[2] or key: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id" and value not in used:
                continue
            element.set(key, _recolour(_prefixed(key, value, prefix)))
    for key in ("version", "width", "height"):
        root.attrib.pop(key, None)
    width = float(root.get("viewBox", "0 0 600 0").split()[2])
    root.set("style", f"max-width: {width * 4 / 3:.0f}px")
    root.set("role", "img")
    root.set("aria-label", what)
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _prefixed(key: str, value: str, prefix: str) -> str:
    """Identifiers, and what points to them, made the figure's own."""
    if key == "id":
        return prefix + value
    if key == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}")


def _recolour(value: str) -> str:
    for colour, variable in COLOURS.items():
        value = value.replace(colour, variable)
    return value

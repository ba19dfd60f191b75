"""What all pictures of a report share: colors, names, panels, the drawing as SVG."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.report.numbers import Row
from nmjax.analysis.plots import COLORS

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = COLORS
# Method -> name and color, which is the same in every picture and table of a page.
_LOOKS = {
    "dense": ("dense", BLACK),
    "one_shot": ("one-shot", ORANGE),
    "ste": ("STE", VERMILION),
    "sr_ste": ("SR-STE", BLUE),
    "sr_ste_decoupled": ("SR-STE after", SKY),
    "sr_ste_negative": ("SR-STE, λ<0", PINK),
    "decaying_mask": ("decaying mask", "#6A3D9A"),
    "decaying_mask_scaled": ("decaying mask, scaled", "#A78BCB"),
    "dense_then": ("dense, then STE", "#7F7F7F"),
    "max_q": ("MaxQ", "#8C1515"),
    "s_ste": ("S-STE", "#00A6B4"),
    "step": ("STEP", "#9A9A00"),
    "cast": ("CAST", "#C2185B"),
    "lbc": ("LBC", "#2F3E75"),
    "one_by_n": ("1xN", "#8B5A2B"),
    "subp_l1": ("SUBP, L1", "#8FBC45"),
    "subp": ("SUBP", GREEN),
}
# Inches. On a phone, this width shows letters at their full size.
_PHONE = 3.7
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    # Letters become outlines, so that the page needs no fonts.
    "svg.fonttype": "path",
    # A fixed salt makes the ids in the SVG, and so the file, the same for the same results.
    "svg.hashsalt": "nmjax",
}


class Picture(NamedTuple):
    """A drawing as SVG, another for phones (or nothing), and the facts that its caption states."""

    svg: bytes
    narrow: bytes
    facts: dict[str, Any]


def source(svg: bytes) -> str:
    """A drawing as the `src` of an HTML image; empty if there is none."""
    return f"data:image/svg+xml;base64,{b64encode(svg).decode()}" if svg else ""


def picture(figure: Figure, *, columns: int = 1, **facts: Any) -> Picture:
    """Turns a figure into SVG, with one legend for all panels below them.

    Args:
      figure: what was drawn. Afterwards it is as for phones.
      columns: of the panels on a phone; 0 for no drawing for phones.
      **facts: for the caption.
    """
    entries = _legend_entries(figure)
    wide = _as_svg(figure, entries, 5)
    if not columns:
        return Picture(wide, b"", facts)
    _stack(figure, columns)
    return Picture(wide, _as_svg(figure, entries, 2), facts)


def _legend_entries(figure: Figure) -> dict[str, Any]:
    """Label -> what is drawn with it; labels of the same name are shown once."""
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    return entries


def _stack(figure: Figure, columns: int) -> None:
    """Moves the panels of a figure into fewer columns, at the width of a phone."""
    axes = figure.axes
    cell = figure.get_figheight() / axes[0].get_gridspec().nrows  # type: ignore[union-attr]
    rows = -(-len(axes) // columns)
    grid = GridSpec(rows, columns, figure=figure)
    for index, ax in enumerate(axes):
        ax.set_subplotspec(grid[index // columns, index % columns])
        if columns == 1 and not ax.get_ylabel():  # It stood at the first panel only.
            ax.set_ylabel(axes[0].get_ylabel())
    figure.set_layout_engine("constrained")
    figure.set_size_inches(_PHONE, rows * cell)


def _as_svg(figure: Figure, entries: dict[str, Any], columns: int) -> bytes:
    place: Any = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    legend = figure.legend(entries.values(), entries.keys(), **place) if entries else None
    buffer = BytesIO()
    # A date would make the file different for the same results.
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    if legend is not None:
        legend.remove()
    return buffer.getvalue()


def name_of(method: str) -> str:
    """The name of a method in tables and legends."""
    return _LOOKS.get(method, (method, ""))[0]


def color_of(method: str) -> str:
    """The color of a method in tables and pictures."""
    return _LOOKS.get(method, ("", "#666666"))[1]


def label_of(row: Row, pattern: str) -> str:
    """The name of a method among those of a pattern, with its own pattern if that is another."""
    # Dense training is the same at every pattern.
    is_plain = row.pattern == pattern or row.method == "dense"
    return name_of(row.method) if is_plain else f"{name_of(row.method)} {row.pattern}"


def panels(count: int, *, height: float) -> tuple[Figure, Any]:
    """A new figure and its axes, side by side."""
    width = 6.4 if count == 1 else 4.8 * count
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def draw_map(ax: Any, image: Any, title: str, **options: Any) -> None:
    """Draws a small picture without ticks; numbers in [0, 1] become shades of gray."""
    ax.imshow(image, cmap="Greys", interpolation="nearest", **options)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.set_title(title, fontsize=8)


def log_scale(ax: Any) -> None:
    """Makes the vertical axis logarithmic; a zero lies at its lower end."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    positive = drawn[drawn > 0]
    if len(positive) == 0 or drawn.min() < 0:
        return
    if drawn.min() == 0:
        # Linear from zero to the smallest value, with a tick at zero.
        ax.set_yscale("symlog", linthresh=positive.min(), linscale=0.5)
        ax.set_ylim(bottom=0)
        return
    ax.set_yscale("log")
    # Below two decades matplotlib labels next to nothing.
    if drawn.max() < 100 * drawn.min():
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())

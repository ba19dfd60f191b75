"""What all pictures of a report share: colors, names, panels, the drawing as SVG."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.report.numbers import Row
from nmjax.analysis.plots import COLORS

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = COLORS
# Method -> name and color. Blocks reuse colors of methods that never share a picture with them.
_LOOKS = {
    "dense": ("dense", BLACK),
    "one_shot": ("one-shot", ORANGE),
    "ste": ("STE", VERMILION),
    "sr_ste": ("SR-STE", BLUE),
    "sr_ste_decoupled": ("SR-STE after", SKY),
    "sr_ste_negative": ("SR-STE, λ<0", PINK),
    "decaying_mask": ("decaying mask", GREEN),
    "decaying_mask_scaled": ("decaying mask, scaled", SKY),
    "dense_then": ("dense, then STE", ORANGE),
    "max_q": ("MaxQ", PINK),
    "s_ste": ("S-STE", VERMILION),
    "step": ("STEP", ORANGE),
    "cast": ("CAST", PINK),
    "lbc": ("LBC", SKY),
    "one_by_n": ("1xN", ORANGE),
    "subp_l1": ("SUBP, L1", SKY),
    "subp": ("SUBP", GREEN),
}
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
    """A drawing as SVG, and the facts that its caption states."""

    svg: bytes
    facts: dict[str, Any]

    @property
    def source(self) -> str:
        """The drawing as the `src` of an HTML image."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg).decode()}"


def picture(figure: Figure, **facts: Any) -> Picture:
    """Turns a figure into SVG, with one legend for all panels below them."""
    # Labels of the same name are shown once.
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        place: Any = {"loc": "outside lower center", "ncols": 5, "fontsize": 8}
        figure.legend(entries.values(), entries.keys(), **place)
    buffer = BytesIO()
    # A date would make the file different for the same results.
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return Picture(buffer.getvalue(), facts)


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
    """Makes the vertical axis logarithmic, unless it is empty or some value is not positive."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    if len(drawn) == 0 or drawn.min() <= 0:
        return
    ax.set_yscale("log")
    # Below two decades matplotlib labels next to nothing.
    if drawn.max() < 100 * drawn.min():
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())

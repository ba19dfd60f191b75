"""How the pictures of a report look: colours, names, panels, and a drawing with its caption."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from nmjax.analysis.plots import COLORS

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = COLORS
METHOD_COLORS = {
    "dense": BLACK,
    "one_shot": ORANGE,
    "ste": VERMILION,
    "sr_ste": BLUE,
    "sr_ste_decoupled": SKY,
    "sr_ste_negative": PINK,
    "one_by_n": ORANGE,
    "subp_l1": SKY,
    "subp": GREEN,
}
METHOD_NAMES = {
    "dense": "dense",
    "one_shot": "one-shot",
    "ste": "STE",
    "sr_ste": "SR-STE",
    "sr_ste_decoupled": "SR-STE after",
    "sr_ste_negative": "SR-STE, λ<0",
    "one_by_n": "1xN",
    "subp_l1": "SUBP, L1",
    "subp": "SUBP",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "nmjax",
}


@dataclass(frozen=True)
class Picture:
    """A drawing and what one sees in it.

    Attributes:
      name: of its file, without ending.
      title: above it.
      caption: below it.
      svg: the drawing.
    """

    name: str
    title: str
    caption: str
    svg: bytes

    @property
    def source(self) -> str:
        """The drawing as the `src` of an HTML image."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg).decode()}"

    def with_caption(self, caption: str) -> Picture:
        """The same drawing with another caption."""
        return replace(self, caption=caption)


def name_of(method: str) -> str:
    """How tables and legends call a method."""
    return METHOD_NAMES.get(method, method)


def legend_below(figure: Figure, axes: Any) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for ax in np.ravel(axes):
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, fontsize=8)


def log_scale(ax: Any) -> None:
    """A logarithmic vertical axis, unless a value is zero or there is none."""
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    if len(drawn) == 0 or drawn.min() <= 0:
        return
    ax.set_yscale("log")
    if drawn.max() < 100 * drawn.min():
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def panels(count: int, *, height: float) -> tuple[Figure, Any]:
    """A new figure and its axes, side by side."""
    width = 6.4 if count == 1 else 4.8 * count
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    return figure, axes[0]


def picture(name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Turns a figure into SVG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return Picture(name, title, caption, buffer.getvalue())

"""Pictures of the metric, the masks and the blocks over the epochs."""

from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import numpy as np

from experiments.report.numbers import Run
from experiments.report.pictures import (
    Picture,
    color_of,
    label_of,
    log_scale,
    name_of,
    panels,
    picture,
)
from nmjax.analysis.plots import plot_curves, plot_sad


def draw_metric_curves(run: Run, part: str = "main") -> Picture | None:
    """Test error over the epochs, one panel for each pattern; part "blocks" has N:M in it."""
    groups, metric = run.groups(part), run.metric
    if not groups:
        return None
    figure, axes = panels(len(groups), height=3.4)
    for ax, (pattern, rows) in zip(axes, groups.items(), strict=True):
        curves = [metric.missing(row.curve(f"test.{metric.name}")) for row in rows]
        errors = {label_of(r, pattern): curve for r, curve in zip(rows, curves, strict=True)}
        colors = {label_of(row, pattern): color_of(row.method) for row in rows}
        plot_curves(errors, rows[0].curve("epoch"), colors=colors, ax=ax)
        ax.set(title=pattern, xlabel="epoch")
        log_scale(ax)
    axes[0].set_ylabel(f"test {metric.missing_title}")
    return picture(figure)


def draw_sad_over_time(run: Run) -> Picture | None:
    """SAD and flip rate over time for every strength at the swept pattern."""
    rows = run.sweep()
    if len(rows) < 2:
        return None
    pattern, times = rows[0].pattern, rows[0].curve("epoch")
    weights = sum(run.settings["weights"][pattern].values())
    density = run.settings["density"][pattern]
    shown = {f"λ = {row.lambda_w:.2g}": row for row in rows}
    # SR-STE has shades of its color in the order of strength, without the pale end.
    refined = [label for label, row in shown.items() if row.method == "sr_ste"]
    shades = mpl.colormaps["Blues"](np.linspace(0.4, 1.0, len(refined)))
    colors = {label: color_of(row.method) for label, row in shown.items()}
    colors |= {n: mpl.colors.to_hex(shade) for n, shade in zip(refined, shades, strict=True)}
    figure, axes = panels(2, height=3.4)
    sads = {label: row.curve("sad_first") for label, row in shown.items()}
    plot_sad(sads, times, weights=weights, density=density, colors=colors, ax=axes[0])
    # plot_sad adds one, but a legend below serves both panels.
    axes[0].get_legend().remove()
    axes[0].set(title="SAD against the initial weights", xlabel="epoch")
    flips = {label: 100 * _windows(row.curve("flip_rate")) for label, row in shown.items()}
    # The means of the epochs are the middles of the windows.
    middles = _windows(times[None].astype(float))[0]
    plot_curves(flips, middles, colors=colors, ax=axes[1])
    axes[1].set(title="Flip rate", xlabel="epoch", ylabel="% of entries in one step")
    log_scale(axes[1])
    return picture(figure, pattern=pattern)


def draw_block_changes(run: Run) -> Picture | None:
    """Blocks that come back in an epoch, and all mask entries that change, over the epochs."""
    shown = {
        f"{name_of(row.method)}, {row.pattern}": row
        for row in run.part("blocks")
        if "regrown" in row.numbers and any(row.numbers["regrown"].values)
    }
    if not shown:
        return None
    times = next(iter(shown.values())).curve("epoch")
    colors = {label: color_of(row.method) for label, row in shown.items()}
    patterns = dict.fromkeys(row.pattern for row in shown.values())
    styles = dict(zip(patterns, cycle(("-", "--", ":", "-.")), strict=False))
    figure, axes = panels(2, height=3.2)
    for ax, column, title, unit in (
        (axes[0], "regrown", "Blocks that came back in an epoch", "blocks"),
        (axes[1], "sad_used", "SAD from one epoch to the next", "mask entries"),
    ):
        curves = {label: row.curve(column) for label, row in shown.items()}
        plot_curves(curves, times, colors=colors, ax=ax)
        for line, row in zip(ax.lines, shown.values(), strict=True):
            line.set_linestyle(styles[row.pattern])
        ax.set(title=title, xlabel="epoch", ylabel=f"{unit}, all layers")
    return picture(figure)


def _windows(values: np.ndarray, length: int = 5) -> np.ndarray:
    """Means over a few epochs at a time, (seeds, windows)."""
    length = min(length, values.shape[1])
    count = values.shape[1] // length
    return values[:, : count * length].reshape(len(values), count, length).mean(axis=2)

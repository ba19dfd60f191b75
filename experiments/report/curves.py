"""Pictures of the metric, the masks and the blocks over the epochs.

Each function returns a `Picture`, or None where the trials that it needs are missing.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np

from experiments.report.numbers import Row, Run
from experiments.report.pictures import (
    PINK,
    Picture,
    block_label,
    color_of,
    legend_below,
    log_scale,
    name_of,
    panels,
    picture,
)
from nmjax.analysis.plots import plot_curves, plot_sad

# Panel -> label -> row.
Groups = dict[str, dict[str, Row]]


def draw_metric_curves(run: Run) -> Picture | None:
    """Test error over the epochs, one panel for each N:M pattern."""
    groups: Groups = {}
    for row in run.part("main"):
        groups.setdefault(row.pattern, {})[name_of(row.method)] = row
    note = ""
    if any(row.method == "one_shot" for row in run.part("main")):
        note = (
            " One-shot trains dense for half of the epochs; then it is pruned and its learning "
            "rate starts again."
        )
    return _draw_errors(run, groups, "curves", "Learning curves", note)


def draw_block_curves(run: Run) -> Picture | None:
    """Test error over the epochs, one panel for each block pattern, with N:M in it."""
    groups: Groups = {}
    for row in run.part("blocks"):
        groups.setdefault(row.pattern, {block_label(r): r for r in run.beside(row.pattern)})
        groups[row.pattern][block_label(row)] = row
    note = ""
    if any(row.method.startswith("subp") for row in run.part("blocks")):
        # The ramp is in fractions of the epochs.
        end = 100 * run.settings["recipe"]["ramp"][1]
        note = f" SUBP starts dense and reaches its density after {end:.0f}% of the epochs."
    return _draw_errors(run, groups, "block_curves", "Learning curves of blocks", note)


def _draw_errors(run: Run, groups: Groups, name: str, title: str, note: str) -> Picture | None:
    if not groups:
        return None
    metric = run.metric
    figure, axes = panels(len(groups), height=3.4)
    for ax, (group, rows) in zip(axes, groups.items(), strict=True):
        errors = {
            label: metric.missing(row.curve(f"test.{metric.name}")) for label, row in rows.items()
        }
        colors = {label: color_of(row.method) for label, row in rows.items()}
        plot_curves(errors, next(iter(rows.values())).curve("epoch"), colors=colors, ax=ax)
        ax.set(title=group, xlabel="epoch")
        log_scale(ax)
    axes[0].set_ylabel(f"test {metric.missing_title}")
    legend_below(figure, axes)
    caption = (
        f"Test {metric.missing_title}. The scale is logarithmic and lower is better; mean and one "
        f"standard error over the seeds.{note}"
    )
    return picture(name, title, caption, figure)


def draw_sad_over_time(run: Run) -> Picture | None:
    """SAD and flip rate over time for every strength at the swept pattern."""
    rows = run.sweep()
    if len(rows) < 2:
        return None
    pattern, times = rows[0].pattern, rows[0].curve("epoch")
    weights = sum(run.settings["weights"][pattern].values())
    density = run.settings["density"][pattern]
    # Shades in the order of strength, without the pale end; a push away from zero gets its own.
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.88, len(rows)))
    shown = {f"λ = {row.lambda_w:.2g}": row for row in rows}
    colors = {
        label: PINK if row.lambda_w < 0 else mpl.colors.to_hex(shade)
        for (label, row), shade in zip(shown.items(), shades, strict=True)
    }
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
    legend_below(figure, axes)
    caption = (
        f"Left: SAD over time at {pattern} for each strength of the pull (0 is STE; the dotted "
        "line marks unrelated masks). Right: the share of the mask that one step changes, "
        "mean over a few epochs at a time."
    )
    return picture("sad_over_time", "Divergence over time, by strength", caption, figure)


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
    figure, axes = panels(2, height=3.2)
    for ax, column, title, unit in (
        (axes[0], "regrown", "Blocks that came back in an epoch", "blocks"),
        (axes[1], "sad_used", "SAD from one epoch to the next", "mask entries"),
    ):
        plot_curves({label: row.curve(column) for label, row in shown.items()}, times, ax=ax)
        ax.set(title=title, xlabel="epoch", ylabel=f"{unit}, all layers")
    legend_below(figure, axes)
    caption = (
        "Masks change once per epoch. Left: blocks that had been dropped and came back. Right: "
        "mask entries that changed either way; a block has one entry for each weight."
    )
    return picture("block_changes", "Blocks that come and go", caption, figure)


def _windows(values: np.ndarray, length: int = 5) -> np.ndarray:
    """Means over a few epochs at a time, (seeds, windows).

    A single epoch late in training may flip nothing, which a logarithmic scale cannot show. Where
    even a whole window flips nothing, the mean is NaN and the curve has a gap.
    """
    length = min(length, values.shape[1])
    count = values.shape[1] // length
    means = values[:, : count * length].reshape(len(values), count, length).mean(axis=2)
    return np.where(means > 0, means, np.nan)

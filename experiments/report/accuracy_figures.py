"""Pictures of what was reached: the metric over the epochs, and every seed at the end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.report.findings import Data, Entry, curve, epochs_of, metric_of, rows
from experiments.report.pictures import (
    GREEN,
    METHOD_COLORS,
    Picture,
    legend_below,
    log_scale,
    name_of,
    panels,
    picture,
)
from experiments.tasks.task import Metric
from nmjax.analysis.plots import plot_curves


def draw_metric_curves(data: Data) -> Picture | None:
    """Test error over the epochs, a panel for each N:M pattern."""
    entries = [t for t in data["trials"] if t["part"] == "main" and not t["error"]]
    if not entries:
        return None
    groups = {
        pattern: {name_of(e["method"]): e for e in entries if e["pattern"] == pattern}
        for pattern in dict.fromkeys(entry["pattern"] for entry in entries)
    }
    colors = {name_of(method): color for method, color in METHOD_COLORS.items()}
    drawn = draw_curves(data, groups, colors, name="curves", title="Learning curves")
    if not any(entry["method"] == "one_shot" for entry in entries):
        return drawn
    return drawn.with_caption(
        f"{drawn.caption} One-shot is dense until half-way, where it is pruned and its learning "
        "rate starts again."
    )


def draw_curves(
    data: Data,
    groups: Mapping[str, Mapping[str, Entry]],
    colors: Mapping[str, str],
    *,
    name: str,
    title: str,
) -> Picture:
    """Test error over the epochs.

    Args:
      data: the content of `results.json`.
      groups: title of a panel -> label -> trial.
      colors: label -> colour.
      name: of the picture.
      title: of the picture.
    """
    metric = metric_of(data)
    figure, axes = panels(len(groups), height=3.4)
    for ax, (group, entries) in zip(axes, groups.items(), strict=True):
        curves = {label: _missing(metric, entry) for label, entry in entries.items()}
        epochs = epochs_of(next(iter(entries.values())))
        plot_curves(curves, epochs, colors=colors, ax=ax)
        ax.set(title=group, xlabel="epoch")
        log_scale(ax)
    axes[0].set_ylabel(f"test {metric.missing_title}")
    legend_below(figure, axes)
    notes = [_on_the_way(metric, group, entries) for group, entries in groups.items()]
    caption = (
        f"Test {metric.missing_title}, over the epochs, mean and one standard error over the "
        "seeds, on a logarithmic scale: lower is better. " + " ".join(notes)
    )
    return picture(name, title, caption, figure)


def _missing(metric: Metric, entry: Entry) -> np.ndarray:
    """How far from perfect after every epoch, (seeds, epochs)."""
    return np.asarray(metric.missing(curve(entry, f"test.{metric.name}")))


def _on_the_way(metric: Metric, group: str, entries: Mapping[str, Entry]) -> str:
    """The test errors two thirds through and at the end."""
    errors = {name: _missing(metric, entry).mean(axis=0) for name, entry in entries.items()}
    known = np.flatnonzero(~np.isnan(next(iter(errors.values()))))
    late = known[np.argmin(np.abs(known - (2 * known[-1]) // 3))]
    digits = metric.digits - 1
    parts = [
        f"{name} {values[late]:.{digits}f} and {values[known[-1]]:.{digits}f} {metric.unit}".strip()
        for name, values in errors.items()
    ]
    epochs = epochs_of(next(iter(entries.values())))
    return f"At {group}, after {epochs[late]} and {epochs[known[-1]]} epochs: {'; '.join(parts)}."


def draw_seeds(data: Data) -> Picture | None:
    """The final metric of every seed."""
    table, metric = rows(data), metric_of(data)
    if not table:
        return None
    patterns = list(dict.fromkeys(row.pattern for row in table))
    figure, axes = panels(len(patterns), height=2.4)
    for ax, pattern in zip(axes, patterns, strict=True):
        here = [row for row in table if row.pattern == pattern]
        for height, row in enumerate(here):
            color = METHOD_COLORS.get(row.method, GREEN)
            values = metric.scale * np.array(row.metric.values)
            jitter = np.linspace(-0.18, 0.18, len(values))
            ax.plot(values, height + jitter, "o", color=color, markersize=4, alpha=0.6)
            mean, error = metric.scale * row.metric.mean, metric.scale * row.metric.error
            ax.errorbar(mean, height, xerr=error, fmt="|", color=color, markersize=18, capsize=3)
        ax.set_yticks(range(len(here)), [name_of(row.method) for row in here])
        ax.set(title=pattern, xlabel=f"test {metric.title}")
        ax.invert_yaxis()
    spreads = {row: np.ptp(row.metric.values) for row in table if len(row.metric.values) > 1}
    caption = "One dot a seed; the bar is the mean, with one standard error."
    if spreads:
        widest = max(spreads, key=lambda row: spreads[row])
        caption += (
            f" Seeds spread most for {name_of(widest.method)} at {widest.pattern}: "
            f"{metric.scale * spreads[widest]:.{metric.digits - 1}f} {metric.step} from the lowest "
            "to the highest."
        )
    return picture("seeds", "Every seed", caption, figure)

"""Pictures of where training ends: every seed, each layer's masks, the sweep, the balance."""

from __future__ import annotations

import numpy as np

from experiments.report.numbers import Run, balance
from experiments.report.pictures import (
    BLACK,
    Picture,
    color_of,
    name_of,
    panels,
    picture,
)
from nmjax.analysis.plots import plot_layer_sad

_MOST_THREADS = 8


def draw_seeds(run: Run) -> Picture | None:
    """The final metric of every seed."""
    groups, metric = run.groups("main"), run.metric
    if not groups:
        return None
    figure, axes = panels(len(groups), height=2.4)
    for ax, (pattern, rows) in zip(axes, groups.items(), strict=True):
        for height, row in enumerate(rows):
            color, found = color_of(row.method), row.numbers["metric"]
            values = metric.scale * np.array(found.values)
            # Spread out, so that equal seeds do not hide each other.
            heights = height + np.linspace(-0.18, 0.18, len(values))
            ax.plot(values, heights, "o", color=color, markersize=4, alpha=0.6)
            mean, error = metric.scale * found.mean, metric.scale * found.error
            ax.errorbar(mean, height, xerr=error, fmt="|", color=color, markersize=18, capsize=3)
        ax.set_yticks(range(len(rows)), [name_of(row.method) for row in rows])
        ax.set(title=pattern, xlabel=f"test {metric.title}")
        ax.invert_yaxis()
    return picture(figure)


def draw_layer_sad(run: Run) -> Picture | None:
    """SAD against the initial weights, layer by layer, for dense and sparse forward passes."""
    groups = {
        pattern: [row for row in rows if row.method in ("dense", "ste", "sr_ste")]
        for pattern, rows in run.groups("main").items()
        if any(row.method in ("ste", "sr_ste") for row in rows)
    }
    if not groups:
        return None
    # As tall as the most layers need, with about 1 cm for each.
    layers = max(len(run.settings["weights"][pattern]) for pattern in groups)
    figure, axes = panels(len(groups), height=0.9 + 0.38 * layers)
    for ax, (pattern, rows) in zip(axes, groups.items(), strict=True):
        density, weights = (run.settings[name][pattern] for name in ("density", "weights"))
        kinds = ["dense" if row.method == "dense" else "sparse" for row in rows]
        labels = [f"{name_of(r.method)} ({k} forward)" for r, k in zip(rows, kinds, strict=True)]
        shown = dict(zip(labels, rows, strict=True))
        sads = {label: row.epochs[-1]["sad_layers"] for label, row in shown.items()}
        colors = {label: color_of(row.method) for label, row in shown.items()}
        plot_layer_sad(sads, weights, density=density, colors=colors, ax=ax)
        ax.set_title(pattern)
    return picture(figure)


def draw_sweep(run: Run) -> Picture | None:
    """Final metric and loss over the strength of the pull."""
    rows = run.sweep()
    if len(rows) < 3:
        return None
    strengths = np.array([row.lambda_w for row in rows])
    dense = run.find(rows[0].pattern, "dense")
    figure, axes = panels(2, height=2.8)
    for ax, name in zip(axes, ("metric", "loss"), strict=True):
        number = run.shown[name]
        means = [number.scale * row.numbers[name].mean for row in rows]
        errors = [number.scale * row.numbers[name].error for row in rows]
        ax.plot(strengths, means, "-", color=color_of("sr_ste"), linewidth=1)
        for row, mean, error in zip(rows, means, errors, strict=True):
            style = {"fmt": "o", "color": color_of(row.method), "capsize": 3}
            ax.errorbar(row.lambda_w, mean, yerr=error, label=name_of(row.method), **style)
        # Linear around 0, where STE is, and logarithmic outside.
        ax.set_xscale("symlog", linthresh=np.min(np.abs(strengths[strengths != 0])))
        ax.set(xlabel="λ (0 is STE)", ylabel=f"test {number.title}")
        if dense is not None:
            level = number.scale * dense.numbers[name].mean
            ax.axhline(level, color=BLACK, linestyle="--", linewidth=1, label="dense")
    return picture(figure, pattern=rows[0].pattern)


def draw_balance(run: Run) -> Picture | None:
    """Blocks in each row of one layer, and what unequal rows cost when threads split them."""
    groups = {
        pattern: [row for row in rows if row.method in ("one_by_n", "subp")]
        for pattern, rows in run.groups("blocks").items()
    }
    # One pattern is enough to see it; the last one has its masks drawn too.
    pattern = next((p for p, rows in reversed(groups.items()) if len(rows) == 2), None)
    if pattern is None:
        return None
    layer, worst, threads = run.largest_layer(pattern), [], range(1, _MOST_THREADS + 1)
    figure, axes = panels(2, height=3.0)
    for index, row in enumerate(groups[pattern]):
        kept, name, color = row.kept, name_of(row.method), color_of(row.method)
        # The first seed's rows; the bars of the two methods stand side by side.
        places = np.arange(kept[layer].shape[1]) + 0.4 * (index - 0.5)
        axes[0].bar(places, kept[layer][0], 0.38, color=color, label=name)
        bounds = [[speed_up_bound(k, t).mean() for t in threads] for k in kept.values()]
        axes[1].plot(threads, np.mean(bounds, axis=0), "o-", color=color, markersize=4)
        share, where = min((float(balance(k).mean()), name) for name, k in kept.items())
        worst.append(f"{name} {where.removesuffix('/kernel')}, balance {100 * share:.0f}%")
    axes[0].set(title=layer.removesuffix("/kernel"), xlabel="row of blocks", ylabel="blocks kept")
    axes[1].plot(threads, threads, color="0.5", linestyle=":", linewidth=1)
    axes[1].set(title="All layers", xlabel="threads", ylabel="bound on the speed-up")
    axes[1].set_xticks(threads)
    return picture(figure, pattern=pattern, worst=worst)


def speed_up_bound(kept: np.ndarray, threads: int) -> np.ndarray:
    """How much faster than one thread several can be: total work over that of the slowest.

    `kept` has the blocks in each row, (..., rows); the bound is (...), at most `threads`. Rows are
    dealt out in their order, as evenly as possible.

    >>> speed_up_bound(np.array([1, 3, 2, 2]), 2).item()
    2.0
    >>> speed_up_bound(np.array([1, 3, 2, 2]), 4).item()  # 8 blocks, and one thread has 3
    2.6666666666666665
    """
    parts = np.array_split(kept, min(threads, kept.shape[-1]), axis=-1)
    slowest = np.max([part.sum(axis=-1) for part in parts], axis=0)
    return np.asarray(kept.sum(axis=-1) / slowest)

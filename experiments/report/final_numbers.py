"""Pictures of where training ends: every seed, each layer's masks, the sweep, the balance.

Each function returns a `Picture`, or None where the trials that it needs are missing.
"""

from __future__ import annotations

import numpy as np

from experiments.report.numbers import Run, balance
from experiments.report.pictures import (
    BLACK,
    BLUE,
    Picture,
    color_of,
    legend_below,
    name_of,
    panels,
    picture,
)
from nmjax.analysis.plots import plot_layer_sad

_MOST_THREADS = 8


def draw_seeds(run: Run) -> Picture | None:
    """The final metric of every seed."""
    rows, metric = run.part("main"), run.metric
    if not rows:
        return None
    patterns = run.patterns("main")
    figure, axes = panels(len(patterns), height=2.4)
    for ax, pattern in zip(axes, patterns, strict=True):
        here = [row for row in rows if row.pattern == pattern]
        for height, row in enumerate(here):
            color, found = color_of(row.method), row.numbers["metric"]
            values = metric.scale * np.array(found.values)
            # Spread out, so that equal seeds do not hide each other.
            heights = height + np.linspace(-0.18, 0.18, len(values))
            ax.plot(values, heights, "o", color=color, markersize=4, alpha=0.6)
            mean, error = metric.scale * found.mean, metric.scale * found.error
            ax.errorbar(mean, height, xerr=error, fmt="|", color=color, markersize=18, capsize=3)
        ax.set_yticks(range(len(here)), [name_of(row.method) for row in here])
        ax.set(title=pattern, xlabel=f"test {metric.title}")
        ax.invert_yaxis()
    caption = "One dot per seed; the bar is the mean, with one standard error."
    return picture("seeds", "Every seed", caption, figure)


def draw_layer_sad(run: Run) -> Picture | None:
    """SAD against the initial weights, layer by layer, for dense and sparse forward passes."""
    rows = [row for row in run.part("main") if row.method in ("dense", "ste", "sr_ste")]
    patterns = list(dict.fromkeys(row.pattern for row in rows if row.method != "dense"))
    if not patterns:
        return None
    # As tall as the most layers need, with about 1 cm for each.
    layers = max(len(run.settings["weights"][pattern]) for pattern in patterns)
    figure, axes = panels(len(patterns), height=0.9 + 0.38 * layers)
    for ax, pattern in zip(axes, patterns, strict=True):
        density, weights = (run.settings[name][pattern] for name in ("density", "weights"))
        here = {
            f"{name_of(r.method)} ({'dense' if r.method == 'dense' else 'sparse'} forward)": r
            for r in rows
            if r.pattern == pattern
        }
        sads = {label: row.epochs[-1]["sad_layers"] for label, row in here.items()}
        colors = {label: color_of(row.method) for label, row in here.items()}
        plot_layer_sad(sads, weights, density=density, colors=colors, ax=ax)
        ax.set_title(pattern)
    legend_below(figure, axes)
    caption = (
        "Mask entries that differ from the initial weights' masks at the end of training. The "
        "dotted line is chance: two unrelated masks differ that much."
    )
    return picture("layer_sad", "Divergence from the initial masks by layer", caption, figure)


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
        ax.errorbar(
            strengths, means, yerr=errors, fmt="o-", color=BLUE, capsize=3, label="STE and SR-STE"
        )
        # Linear around 0, where STE is, and logarithmic outside.
        ax.set_xscale("symlog", linthresh=np.min(np.abs(strengths[strengths != 0])))
        ax.set(xlabel="λ (0 is STE)", ylabel=f"test {number.title}")
        if dense is not None:
            level = number.scale * dense.numbers[name].mean
            ax.axhline(level, color=BLACK, linestyle="--", linewidth=1, label="dense")
    legend_below(figure, axes)
    caption = f"Results at {rows[0].pattern} over the strength, mean and one standard error."
    return picture("sweep", "Results over the strength of the pull", caption, figure)


def draw_balance(run: Run) -> Picture | None:
    """Blocks in each row of one layer, and what unequal rows cost when threads split them."""
    methods = ("one_by_n", "subp")
    found = {p: [run.find(p, m) for m in methods] for p in run.settings["block_patterns"]}
    whole = {p: [row for row in rows if row] for p, rows in found.items() if None not in rows}
    if not whole:
        return None
    # One pattern is enough to see it; the last one has its masks drawn too.
    pattern, rows = list(whole.items())[-1]
    layer, notes = run.largest_layer(pattern), []
    figure, axes = panels(2, height=3.0)
    threads = range(1, _MOST_THREADS + 1)
    for index, row in enumerate(rows):
        kept, name, color = row.kept, name_of(row.method), color_of(row.method)
        first = kept[layer][0]
        axes[0].bar(
            np.arange(len(first)) + 0.4 * (index - 0.5), first, 0.38, color=color, label=name
        )
        bounds = [[speed_up_bound(k, t).mean() for t in threads] for k in kept.values()]
        axes[1].plot(threads, np.mean(bounds, axis=0), "o-", color=color, markersize=4)
        share, worst = min((float(balance(k).mean()), name) for name, k in kept.items())
        notes.append(f"{name} {worst.removesuffix('/kernel')}, balance {100 * share:.0f}%")
    axes[0].set(title=layer.removesuffix("/kernel"), xlabel="row of blocks", ylabel="blocks kept")
    axes[1].plot(threads, threads, color="0.5", linestyle=":", linewidth=1)
    axes[1].set(title="All layers", xlabel="threads", ylabel="bound on the speed-up")
    axes[1].set_xticks(threads)
    legend_below(figure, axes)
    caption = (
        f"At {pattern}. Left: blocks kept in each row of one layer, first seed. Right: threads "
        "take equal numbers of rows, and the thread with the most blocks finishes last. The bound "
        "on the speed-up is the work of all threads divided by the work of that thread, averaged "
        "over layers and seeds. It is counted, not timed. The dotted line is the number of "
        f"threads; a layer with fewer rows cannot reach it. Worst layers: {'; '.join(notes)}."
    )
    return picture("balance", "Blocks per row and the speed-up they allow", caption, figure)


def speed_up_bound(kept: np.ndarray, threads: int) -> np.ndarray:
    """How much faster than one thread several can be, if each takes the same number of rows.

    The slowest thread decides: total work divided by the largest sum of one thread's rows. Rows
    are dealt out in their order, as evenly as possible.

    Args:
      kept: blocks in each row, (..., rows).
      threads: at least 1.

    Returns:
      (...), at most `threads`.

    >>> speed_up_bound(np.array([1, 3, 2, 2]), 2).item()
    2.0
    >>> speed_up_bound(np.array([1, 3, 2, 2]), 4).item()  # 8 blocks, and one thread has 3
    2.6666666666666665
    """
    parts = np.array_split(kept, min(threads, kept.shape[-1]), axis=-1)
    slowest = np.max([part.sum(axis=-1) for part in parts], axis=0)
    return np.asarray(kept.sum(axis=-1) / slowest)

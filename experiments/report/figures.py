"""The pictures of a comparison's report, drawn from `results.json`, with captions from its numbers.

Each function returns a `Picture`, or None where the trials that it needs are missing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.report.accuracy_figures import draw_metric_curves, draw_seeds
from experiments.report.block_figures import (
    draw_balance,
    draw_block_changes,
    draw_block_curves,
    draw_block_masks,
)
from experiments.report.findings import (
    Data,
    Entry,
    curve,
    epochs_of,
    find_row_of,
    in_words,
    metric_of,
    rows,
    sweep_rows,
    weights_of,
)
from experiments.report.pictures import (
    BLACK,
    BLUE,
    METHOD_COLORS,
    METHOD_NAMES,
    PINK,
    STYLE,
    Picture,
    legend_below,
    log_scale,
    name_of,
    panels,
    picture,
)
from nmjax.analysis.plots import plot_curves, plot_kernels, plot_layer_sad, plot_sad


def draw_all(data: Data) -> list[Picture]:
    """Every picture that the finished trials allow."""
    with mpl.rc_context(STYLE):
        drawn = [draw(data) for draw in _PICTURES]
    return [picture for picture in drawn if picture is not None]


def draw_examples(data: Data) -> Picture | None:
    """Some test images as the network sees them."""
    examples = data.get("examples")
    if not examples:
        return None
    images = np.array(examples["images"], float)
    figure = Figure(figsize=(9, 1.15))
    axes: Any = figure.subplots(1, len(images), squeeze=False)
    for ax, image, label in zip(axes[0], images, examples["labels"], strict=True):
        ax.imshow(image.squeeze(), cmap="Greys", interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{label}", fontsize=9)
        ax.spines[:].set_visible(False)
    caption = f"The first {len(images)} test images, with their labels."
    return picture("examples", "What the network sees", caption, figure)


def draw_layer_sad(data: Data) -> Picture | None:
    """SAD against the initial weights, layer by layer, dense and sparse forward passes."""
    shown = ("dense", "ste", "sr_ste")
    entries = [entry for entry in _main(data) if entry["method"] in shown]
    patterns = list(dict.fromkeys(e["pattern"] for e in entries if e["method"] != "dense"))
    if not patterns:
        return None
    layers = max(len(data["settings"]["weights"][pattern]) for pattern in patterns)
    figure, axes = panels(len(patterns), height=0.9 + 0.38 * layers)
    table, notes = rows(data), []
    for ax, pattern in zip(axes, patterns, strict=True):
        groups = {
            f"{name_of(e['method'])} ({'dense' if e['method'] == 'dense' else 'sparse'} forward)": (
                e["epochs"][-1]["sad_layers"]
            )
            for e in entries
            if e["pattern"] == pattern
        }
        colors = {label: METHOD_COLORS[_key(label)] for label in groups}
        density = data["settings"]["density"][pattern]
        weights = data["settings"]["weights"][pattern]
        plot_layer_sad(groups, weights, density=density, colors=colors, ax=ax)
        ax.set_title(pattern)
        chance = 2 * density * (1 - density)
        totals = [
            f"{name_of(row.method)} {100 * row.sad.mean:.1f} % "
            f"({100 * row.sad.mean / chance:.0f} % of chance)"
            for row in table
            if row.pattern == pattern and row.method in shown
        ]
        notes.append(f"At {pattern}, over all layers: {', '.join(totals)}.")
    legend_below(figure, axes)
    caption = (
        "Mask entries that differ from the initial weights' masks at the end of training. The "
        "dotted line is chance, where two unrelated masks would be. " + " ".join(notes)
    )
    return picture("layer_sad", "How far each layer's topology moved", caption, figure)


def draw_sad_over_time(data: Data) -> Picture | None:
    """SAD and flip rate over time for every strength at the swept pattern."""
    entries = _swept(data)
    if not entries:
        return None
    pattern = entries[0]["pattern"]
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.88, len(entries)))
    labels = [f"λ = {entry['lambda_w']:.2g}" for entry in entries]
    colors = {label: mpl.colors.to_hex(s) for label, s in zip(labels, shades, strict=True)}
    colors |= {
        label: PINK for label, entry in zip(labels, entries, strict=True) if entry["lambda_w"] < 0
    }
    figure, axes = panels(2, height=3.4)
    sads = {label: curve(e, "sad_first") for label, e in zip(labels, entries, strict=True)}
    density = data["settings"]["density"][pattern]
    weights, epochs = weights_of(data, pattern), epochs_of(entries[0])
    plot_sad(sads, epochs, weights=weights, density=density, colors=colors, ax=axes[0])
    axes[0].get_legend().remove()
    axes[0].set(title="SAD against the initial weights", xlabel="epoch")
    windows = [_windows(curve(entry, "flip_rate")) for entry in entries]
    flips = {label: 100 * flipped for label, (_, flipped) in zip(labels, windows, strict=True)}
    plot_curves(flips, windows[0][0], colors=colors, ax=axes[1])
    axes[1].set(title="Flip rate", xlabel="epoch", ylabel="% of entries in a step")
    log_scale(axes[1])
    axes[1].legend(fontsize=8, loc="lower left")
    ranked = ", ".join(
        f"{row.lambda_w:.2g}: {100 * row.sad.mean:.1f} %" for row in sweep_rows(data)
    )
    caption = (
        f"Left: SAD over time at {pattern} for each strength of the sparse-refined term (0 is STE; "
        "the dotted line is chance). Right: how much of the mask one step flips. SAD at the end, "
        f"by strength: {ranked}."
    )
    return picture("sad_over_time", "Divergence over time, by strength", caption, figure)


def draw_sweep(data: Data) -> Picture | None:
    """Final metric and loss over the strength."""
    table, metric = sweep_rows(data), metric_of(data)
    if len(table) < 3:
        return None
    strengths = np.array([row.lambda_w for row in table])
    smallest = np.min(np.abs(strengths[strengths != 0]))
    figure, axes = panels(2, height=2.8)
    for ax, column, label in (
        (axes[0], "metric", f"test {metric.title}"),
        (axes[1], "loss", "test loss"),
    ):
        scale = metric.scale if column == "metric" else 1
        rises = column == "metric" and metric.sign > 0
        means = [scale * getattr(row, column).mean for row in table]
        errors = [scale * getattr(row, column).error for row in table]
        ax.errorbar(strengths, means, yerr=errors, fmt="o-", color=BLUE, capsize=3, markersize=4)
        ax.set_xscale("symlog", linthresh=smallest)
        ax.set(xlabel="λ (0 is STE)", ylabel=label)
        dense = find_row_of(rows(data), table[0].pattern, "dense")
        if dense is not None:
            ax.axhline(scale * getattr(dense, column).mean, color=BLACK, linestyle="--", lw=1)
            ax.annotate(
                "dense",
                (1, scale * getattr(dense, column).mean),
                (-2, -3 if rises else 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="top" if rises else "bottom",
                fontsize=8,
            )
    best = max(table, key=lambda row: metric.sign * row.metric.mean)
    zero = [row for row in table if row.lambda_w == 0]
    caption = (
        f"Results at {table[0].pattern} over the strength, mean and one standard error. The best "
        f"of these is {best.lambda_w:.2g}, with {metric.title} "
        f"{metric.scale * best.metric.mean:.{metric.digits}f}"
    )
    if zero and best.lambda_w != 0:
        gain = best.metric.minus(zero[0].metric)
        caption += f", {in_words('metric', gain, metric)} against STE"
    return picture("sweep", "How strong should the pull be?", caption + ".", figure)


def draw_shapes(data: Data) -> Picture | None:
    """Kernels of a network grouped over whole filters, as binary maps."""
    shapes, entries = data.get("shapes"), [t for t in data["trials"] if t["part"] == "shapes"]
    if not shapes or not entries:
        return None
    codes = shapes["kernels"]
    taps = np.array([[[int(tap) for tap in code] for code in row] for row in codes])
    mask = taps.reshape(*taps.shape[:2], 3, 3).transpose(2, 3, 0, 1).astype(bool)
    figure = plot_kernels(mask)
    counts = Counter(code for row in codes for code in row)
    total, empty = sum(counts.values()), counts["0" * 9]
    shape, often = max(((c, n) for c, n in counts.items() if "1" in c), key=lambda item: item[1])
    share = 100 * mask.mean(axis=(2, 3))
    corners = share[::2, ::2].mean()
    metric = metric_of(data)
    reached = metric.scale * np.mean(entries[0]["epochs"][-1]["test"][metric.name])
    caption = (
        f"Kept taps (dark) of the 3x3 kernels of {shapes['layer'].removesuffix('/kernel')}, "
        f"trained with SR-STE at {entries[0]['pattern']}: groups run over all inputs of a filter, "
        f"input channel by input channel, as in the paper's Figure 5. Of {total} kernels {empty} "
        f"are empty; {len(counts)} different shapes occur, most often {_grid_words(shape)} "
        f"({often} times). The centre tap is kept in {share[1, 1]:.0f} % of the kernels, a corner "
        f"in {corners:.0f} %. Test {metric.name}: {reached:.1f} {metric.unit}."
    )
    return picture("shapes", "Kernel shapes", caption, figure)


_PICTURES = (
    draw_examples,
    draw_metric_curves,
    draw_seeds,
    draw_layer_sad,
    draw_sad_over_time,
    draw_sweep,
    draw_shapes,
    draw_block_curves,
    draw_block_changes,
    draw_block_masks,
    draw_balance,
)


def _main(data: Data) -> list[Entry]:
    return [t for t in data["trials"] if t["part"] == "main" and not t["error"]]


def _swept(data: Data) -> list[Entry]:
    """The trials of `sweep_rows`, in its order, where there is more than one."""
    wanted = {(row.method, row.lambda_w) for row in sweep_rows(data)}
    pattern = data["settings"]["patterns"][-1]
    entries = [
        t
        for t in data["trials"]
        if t["part"] in ("main", "sweep")
        and t["pattern"] == pattern
        and (t["method"], t["lambda_w"]) in wanted
    ]
    return sorted(entries, key=lambda t: t["lambda_w"]) if len(entries) > 1 else []


def _windows(values: np.ndarray, length: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Means over `length` epochs at a time, at the middle of each; NaN where nothing happened.

    A single epoch late in training may flip nothing, which a logarithmic scale cannot show.
    """
    length = min(length, values.shape[1])
    count = values.shape[1] // length
    means = values[:, : count * length].reshape(len(values), count, length).mean(axis=2)
    return (np.arange(count) + 0.5) * length + 0.5, np.where(means > 0, means, np.nan)


def _key(label: str) -> str:
    name = label.split(" (")[0]
    return next(method for method, shown in METHOD_NAMES.items() if shown == name)


def _grid_words(code: str) -> str:
    """A shape as three rows of dots, for running text."""
    signs = code.replace("1", "■").replace("0", "□")
    return f"{signs[:3]}/{signs[3:6]}/{signs[6:]}"

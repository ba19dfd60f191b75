"""The pictures of 1xN blocks: learning curves, what comes and goes, masks, balance of work.

Each function returns a `Picture`, or None where the trials that it needs are missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.accuracy_figures import draw_curves
from experiments.report.block_findings import (
    balance,
    beside,
    block_entries,
    block_tables,
    kept_rows,
    largest_layer,
    remembers_blocks,
    speed_up_bound,
)
from experiments.report.findings import Data, Entry, curve, epochs_of
from experiments.report.pictures import (
    METHOD_COLORS,
    Picture,
    legend_below,
    name_of,
    panels,
    picture,
)
from nmjax.analysis.plots import COLORS, plot_curves

# How many moments of a mask are drawn side by side.
_MOMENTS = 6
_MOST_THREADS = 8


def draw_block_curves(data: Data) -> Picture | None:
    """Test error over the epochs, a panel for each block pattern, N:M beside it."""
    groups: dict[str, dict[str, Entry]] = {}
    for pattern in block_tables(data):
        main = [_entry(data, row.pattern, row.method) for row in beside(data, pattern)]
        groups[pattern] = {_label(entry): entry for entry in main + block_entries(data, pattern)}
    if not groups:
        return None
    entries = [entry for group in groups.values() for entry in group.values()]
    colors = {_label(entry): METHOD_COLORS[entry["method"]] for entry in entries}
    drawn = draw_curves(data, groups, colors, name="block_curves", title="Learning curves, blocks")
    return drawn.with_caption(
        f"{drawn.caption} SUBP starts dense and has dropped all it will drop after "
        f"{100 * data['settings']['recipe']['ramp'][1]:.0f} % of the epochs; SR-STE is N:M from "
        "the first step."
    )


def draw_block_changes(data: Data) -> Picture | None:
    """Blocks that come back in an epoch, and all mask entries that change, over the epochs."""
    entries = [
        entry
        for entry in block_entries(data)
        if remembers_blocks(entry) and curve(entry, "regrown").any()
    ]
    if not entries:
        return None
    labels = [f"{name_of(entry['method'])}, {entry['pattern']}" for entry in entries]
    colors = {label: COLORS[index % len(COLORS)] for index, label in enumerate(labels)}
    figure, axes = panels(2, height=3.2)
    for ax, column, title in (
        (axes[0], "regrown", "Blocks that came back in an epoch"),
        (axes[1], "sad_used", "SAD from one epoch to the next"),
    ):
        curves = {label: curve(e, column) for label, e in zip(labels, entries, strict=True)}
        plot_curves(curves, epochs_of(entries[0]), colors=colors, ax=ax)
        ax.set(title=title, xlabel="epoch")
    axes[0].set_ylabel("blocks, all layers")
    axes[1].set_ylabel("mask entries, all layers")
    legend_below(figure, axes)
    peaks = [
        f"{label} {curve(e, 'regrown').mean(axis=0).max():.0f}"
        for label, e in zip(labels, entries, strict=True)
    ]
    caption = (
        "Masks are renewed once an epoch. Left: blocks that were out and are back. Right: mask "
        "entries that changed either way; a block has as many entries as weights. Most blocks "
        f"that came back in one epoch, mean over the seeds: {'; '.join(peaks)}."
    )
    return picture("block_changes", "What comes and goes", caption, figure)


def draw_block_masks(data: Data) -> Picture | None:
    """The blocks that one layer keeps, at several moments of training."""
    films = {
        name: film
        for name, film in data.get("films", {}).items()
        if name.endswith(("subp", "one_by_n"))
    }
    if not films:
        return None
    pattern = next(reversed(films)).split()[0]
    films = {name: film for name, film in films.items() if name.split()[0] == pattern}
    figure = Figure(figsize=(9.6, 0.35 + 1.35 * len(films)), layout="constrained")
    grid: Any = figure.subplots(len(films), _MOMENTS, squeeze=False)
    notes = []
    for axes, (name, film) in zip(grid, films.items(), strict=True):
        method = name_of(name.split()[1])
        moments = [film[i] for i in np.linspace(0, len(film) - 1, _MOMENTS).round().astype(int)]
        for ax, moment in zip(axes, moments, strict=True):
            mask = np.array([[int(block) for block in row] for row in moment["rows"]])
            ax.imshow(mask, cmap="Greys", vmin=0, vmax=1.2, interpolation="nearest", aspect="auto")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.set_title(f"{method}, epoch {moment['epoch']}", fontsize=8)
        kept = [sum(map(int, row)) for row in film[-1]["rows"]]
        notes.append(f"{method}: {min(kept)} to {max(kept)} of {len(film[-1]['rows'][0])}")
    grid[-1, 0].set_xlabel("input channel", fontsize=8)
    grid[-1, 0].set_ylabel("row", fontsize=8)
    layer = next(iter(films.values()))[-1]["layer"].removesuffix("/kernel")
    caption = (
        f"Kept blocks (dark) of {layer} at {pattern}, first seed. A line is one row of blocks, the "
        "outputs that share them; across run the input channels. Blocks kept in a row at the end: "
        f"{'; '.join(notes)}."
    )
    return picture("block_masks", "One layer's blocks over time", caption, figure)


def draw_balance(data: Data) -> Picture | None:
    """Blocks in each row of one layer, and what unequal rows cost when threads share them."""
    methods = ("one_by_n", "subp")
    entries = [entry for entry in block_entries(data) if entry["method"] in methods]
    patterns = [
        pattern
        for pattern in dict.fromkeys(entry["pattern"] for entry in entries)
        if {e["method"] for e in entries if e["pattern"] == pattern} == set(methods)
    ]
    if not patterns:
        return None
    pattern = patterns[-1]
    layer = largest_layer(data, pattern)
    shown = {e["method"]: kept_rows(e) for e in entries if e["pattern"] == pattern}
    figure, axes = panels(2, height=3.0)
    threads = range(1, _MOST_THREADS + 1)
    notes = []
    for index, method in enumerate(methods):
        kept, color = shown[method][layer][0], METHOD_COLORS[method]
        at = np.arange(len(kept)) + 0.4 * (index - 0.5)
        axes[0].bar(at, kept, 0.38, color=color, label=name_of(method))
        bounds = [[speed_up_bound(k, t).mean() for t in threads] for k in shown[method].values()]
        axes[1].plot(threads, np.mean(bounds, axis=0), "o-", color=color, markersize=4)
        worst = min(shown[method], key=lambda name: float(balance(shown[method][name]).mean()))
        share = 100 * balance(shown[method][worst]).mean()
        notes.append(
            f"{name_of(method)} {np.mean(bounds, axis=0)[-1]:.2f} ({share:.0f} % balance "
            f"in its worst layer, {worst.removesuffix('/kernel')})"
        )
    axes[0].set(title=layer.removesuffix("/kernel"), xlabel="row of blocks", ylabel="blocks kept")
    axes[1].plot(threads, threads, color="0.5", linestyle=":", linewidth=1)
    axes[1].set(
        title="All layers", xlabel="threads", ylabel="speed-up that balance allows", xticks=threads
    )
    legend_below(figure, axes)
    caption = (
        f"At {pattern}. Left: blocks kept in each row of one layer, first seed. Right: if each "
        "thread takes as many rows, the one with the most blocks finishes last; total work over "
        "its work, mean over layers and seeds, is how many times as fast the threads can be "
        "together. Counted, not timed; the dotted line is as many times as there are threads, "
        f"which layers with fewer rows cannot reach. With {_MOST_THREADS} threads: "
        f"{'; '.join(notes)}."
    )
    return picture("balance", "Equal rows, equal work", caption, figure)


def _label(entry: Entry) -> str:
    """The method, and its pattern where that is not the panel's."""
    name = name_of(entry["method"])
    beside_others = entry["part"] != "blocks" and entry["method"] != "dense"
    return f"{name} {entry['pattern']}" if beside_others else name


def _entry(data: Data, pattern: str, method: str) -> Entry:
    """The trial of the main table, or beside the blocks, at a pattern."""
    return next(
        t
        for t in data["trials"]
        if t["part"] in ("main", "beside") and (t["pattern"], t["method"]) == (pattern, method)
    )

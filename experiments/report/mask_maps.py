"""Small maps: test images, kernel shapes, the blocks of one layer.

Each function returns a `Picture`, or None where the results that it needs are missing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.numbers import Run
from experiments.report.pictures import Picture, draw_map, name_of, picture
from nmjax.analysis.plots import plot_kernels

# Moments of training at which a mask is drawn.
_MOMENTS = 6


def draw_examples(run: Run) -> Picture | None:
    """Some test images as the network sees them."""
    examples = run.data.get("examples")
    if not examples:
        return None
    images = np.array(examples["images"], float)
    figure = Figure(figsize=(9, 1.15))
    axes: Any = figure.subplots(1, len(images), squeeze=False)
    for ax, image, label in zip(axes[0], images, examples["labels"], strict=True):
        draw_map(ax, image.squeeze(), f"{label}")
        ax.spines[:].set_visible(False)
    caption = f"The first {len(images)} test images, with their labels."
    return picture("examples", "Test images", caption, figure)


def draw_shapes(run: Run) -> Picture | None:
    """Kernels of a network grouped over whole filters, as binary maps."""
    shapes, rows = run.data.get("shapes"), run.part("shapes")
    if not shapes or not rows:
        return None
    codes = shapes["kernels"]
    taps = np.array([[[int(tap) for tap in code] for code in row] for row in codes])
    # (input, output, tap) -> HWIO, as plot_kernels takes it.
    mask = taps.reshape(*taps.shape[:2], 3, 3).transpose(2, 3, 0, 1).astype(bool)
    # A kernel's nine digits are its shape.
    counts = Counter(code for row in codes for code in row)
    shape, often = max(((c, n) for c, n in counts.items() if "1" in c), key=lambda item: item[1])
    dots = shape.replace("1", "■").replace("0", "□")
    share = 100 * mask.mean(axis=(2, 3))
    metric = run.metric
    reached = metric.scale * rows[0].numbers["metric"].mean
    caption = (
        f"Kept taps (dark) of the 3x3 kernels of {shapes['layer'].removesuffix('/kernel')}, "
        f"trained with SR-STE at {rows[0].pattern}. Groups run over a whole filter, one input "
        f"channel after the other, as in the paper's Figure 5. {counts['0' * 9]} of "
        f"{counts.total()} kernels are empty. There are {len(counts)} different shapes; the most "
        f"common is {dots[:3]}/{dots[3:6]}/{dots[6:]} ({often} times). The center tap is kept in "
        f"{share[1, 1]:.0f}% of the kernels, a corner in {share[::2, ::2].mean():.0f}%. Test "
        f"{metric.name}: {reached:.{metric.digits - 1}f} {metric.unit}"
    )
    return picture("shapes", "Kernel shapes", f"{caption.strip()}.", plot_kernels(mask))


def draw_block_masks(run: Run) -> Picture | None:
    """The blocks that one layer keeps at several moments of training, at the last pattern."""
    films = {
        tuple(name.split()): film
        for name, film in run.data.get("films", {}).items()
        if name.endswith(("subp", "one_by_n"))
    }
    if not films:
        return None
    # Films are named "1x4@0.5 subp".
    pattern, _ = next(reversed(films))
    films = {name: film for name, film in films.items() if name[0] == pattern}
    figure = Figure(figsize=(9.6, 0.35 + 1.35 * len(films)), layout="constrained")
    grid: Any = figure.subplots(len(films), _MOMENTS, squeeze=False)
    for axes, ((_, method), film) in zip(grid, films.items(), strict=True):
        moments = [film[i] for i in np.linspace(0, len(film) - 1, _MOMENTS).round().astype(int)]
        for ax, moment in zip(axes, moments, strict=True):
            mask = np.array([[int(block) for block in row] for row in moment["rows"]])
            title = f"{name_of(method)}, epoch {moment['epoch']}"
            # 1.2 makes kept blocks dark gray, as in the other pictures of masks.
            draw_map(ax, mask, title, vmin=0, vmax=1.2, aspect="auto")
    grid[-1, 0].set_xlabel("input channel", fontsize=8)
    grid[-1, 0].set_ylabel("row", fontsize=8)
    caption = (
        f"Kept blocks (dark) of {film[-1]['layer'].removesuffix('/kernel')} at {pattern}, first "
        "seed. Each line is one row of blocks, the blocks of the same outputs; input channels run "
        "from left to right."
    )
    return picture("block_masks", "The blocks of one layer over time", caption, figure)

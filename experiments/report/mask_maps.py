"""Small maps: test images, kernel shapes, the blocks of one layer."""

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
    return picture(figure, columns=5, count=len(images))


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
    return picture(
        plot_kernels(mask),
        columns=0,
        layer=shapes["layer"].removesuffix("/kernel"),
        pattern=rows[0].pattern,
        kernels=counts.total(),
        empty=counts["0" * 9],
        shapes=len(counts),
        common=f"{dots[:3]}/{dots[3:6]}/{dots[6:]}",
        often=often,
        center=share[1, 1],
        corner=share[::2, ::2].mean(),
        reached=run.shown["metric"].show(rows[0].numbers["metric"]),
    )


def draw_block_masks(run: Run) -> Picture | None:
    """The blocks that one layer keeps at several moments of training, at the last pattern."""
    # Films are named "1x4@0.5 subp".
    films = [(*name.split(), film) for name, film in run.data.get("films", {}).items()]
    films = [film for film in films if film[1] in ("subp", "one_by_n")]
    if not films:
        return None
    pattern = films[-1][0]
    films = [film for film in films if film[0] == pattern]
    figure = Figure(figsize=(9.6, 0.35 + 1.35 * len(films)), layout="constrained")
    grid: Any = figure.subplots(len(films), _MOMENTS, squeeze=False)
    for axes, (_, method, film) in zip(grid, films, strict=True):
        moments = np.linspace(0, len(film) - 1, _MOMENTS).round().astype(int)
        for ax, moment in zip(axes, [film[index] for index in moments], strict=True):
            mask = np.array([[int(block) for block in row] for row in moment["rows"]])
            title = f"{name_of(method)}, epoch {moment['epoch']}"
            # 1.2 makes kept blocks dark gray, as in the other pictures of masks.
            draw_map(ax, mask, title, vmin=0, vmax=1.2, aspect="auto")
    grid[-1, 0].set_xlabel("input channel", fontsize=8)
    grid[-1, 0].set_ylabel("row", fontsize=8)
    layer = films[-1][-1][-1]["layer"].removesuffix("/kernel")
    return picture(figure, columns=2, layer=layer, pattern=pattern)

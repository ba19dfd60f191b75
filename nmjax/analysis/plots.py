"""Plots of sparse training: divergence over time and by layer, masks, kernel shapes.

Every function draws into the axes that it is given, or into new ones, and returns them or their
figure. matplotlib is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which color-blind readers can distinguish, without its pale yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_curves(
    curves: Mapping[str, ArrayLike],
    x: ArrayLike | None = None,
    *,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws curves over time, with a band of one standard error if there are several seeds.

    Args:
      curves: label -> values (time,) or (seeds, time). Times with a NaN are left out.
      x: (time,), for all curves; by default 0, 1, 2 ...
      colors: label -> color; by default `COLORS`.
      ax: axes to draw into.

    Returns:
      The axes.
    """
    ax = _axes(ax)
    for index, (label, values) in enumerate(curves.items()):
        runs = np.atleast_2d(np.asarray(values, float))
        times = np.arange(runs.shape[1]) if x is None else np.asarray(x)
        color = (colors or {}).get(label, COLORS[index % len(COLORS)])
        # One missing seed would bias the mean, so its times are left out for all seeds.
        known = ~np.isnan(runs).any(axis=0)
        mean, error = runs.mean(axis=0), _standard_error(runs)
        ax.plot(times[known], mean[known], color=color, label=label, linewidth=1.8)
        if len(runs) > 1:
            band = (mean - error)[known], (mean + error)[known]
            ax.fill_between(times[known], *band, color=color, alpha=0.2, linewidth=0)
    return ax


def plot_sad(
    curves: Mapping[str, ArrayLike],
    x: ArrayLike | None = None,
    *,
    weights: int | None = None,
    density: float | None = None,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws Sparse Architecture Divergence over time.

    Args:
      curves: label -> SAD (time,) or (seeds, time), in mask entries.
      x: (time,); by default 0, 1, 2 ...
      weights: number of weights that the masks cover, to draw percent instead of entries.
      density: fraction of weights kept, to draw a line at the SAD of two unrelated masks:
        2 * density * (1 - density) of the weights.
      colors: label -> color.
      ax: axes to draw into.

    Returns:
      The axes.

    Raises:
      ValueError: `density` without `weights`.

    Source: Figure 4a of Zhou et al., ICLR 2021.
    """
    if density is not None and not weights:
        raise ValueError(f"density={density} is drawn in percent of the weights; pass weights= too")
    unit = 100.0 / weights if weights else 1.0
    scaled = {label: np.asarray(values, float) * unit for label, values in curves.items()}
    ax = plot_curves(scaled, x, colors=colors, ax=ax)
    if density is not None:
        _draw_chance(ax, density, vertical=False)
    ax.set_ylabel("SAD, % of mask entries" if weights else "SAD, mask entries")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def plot_layer_sad(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    weights: Mapping[str, int],
    *,
    density: float | None = None,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the SAD of each layer as bars, with one color for each method.

    Args:
      groups: label -> layer -> SAD in mask entries, a scalar or (seeds,).
      weights: layer -> number of weights.
      density: fraction of weights kept, to draw a line at the SAD of two unrelated masks.
      colors: label -> color.
      ax: axes to draw into.

    Returns:
      The axes, with the first layer on top.

    Source: Figure 3b of Zhou et al., ICLR 2021.
    """
    ax = _axes(ax)
    layers = list(weights)
    height = 0.8 / max(len(groups), 1)
    for index, (label, by_layer) in enumerate(groups.items()):
        shares = [100 * np.atleast_1d(np.asarray(by_layer[n])) / weights[n] for n in layers]
        ax.barh(
            np.arange(len(layers)) + (index - (len(groups) - 1) / 2) * height,
            [share.mean() for share in shares],
            height,
            xerr=[_standard_error(share) for share in shares] if len(shares[0]) > 1 else None,
            color=(colors or {}).get(label, COLORS[index % len(COLORS)]),
            error_kw={"linewidth": 0.8},
            label=label,
        )
    ax.set_yticks(np.arange(len(layers)), [name.removesuffix("/kernel") for name in layers])
    ax.invert_yaxis()
    ax.set_xlabel("SAD, % of mask entries")
    if density is not None:
        _draw_chance(ax, density, vertical=True)
    return ax


def plot_mask(mask: ArrayLike, *, m: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws the mask of a matrix: kept weights are dark, the reduction axis runs down.

    Args:
      mask: booleans (..., in, out); leading axes run down too.
      m: group size, to draw lines between groups.
      ax: axes to draw into.

    Returns:
      The axes.
    """
    ax = _axes(ax)
    rows = np.asarray(mask).reshape(-1, np.shape(mask)[-1])
    # 1.2 instead of 1 draws kept weights in dark gray, so that lines on them stay visible.
    ax.imshow(rows, cmap="Greys", vmin=0, vmax=1.2, interpolation="nearest", aspect="auto")
    for edge in range(m, len(rows), m) if m else ():
        ax.axhline(edge - 0.5, color=COLORS[1], linewidth=0.6)
    ax.set(xlabel="output", ylabel="input")
    return ax


def plot_kernels(
    mask: ArrayLike, *, inputs: Sequence[int] | None = None, outputs: Sequence[int] | None = None
) -> Figure:
    """Draws which taps of each convolution kernel are kept, as a grid of small binary maps.

    Args:
      mask: booleans (rows, columns, in, out), for a HWIO kernel.
      inputs: input channels, from top to bottom; by default the first eight.
      outputs: output channels, from left to right; by default the first sixteen.

    Returns:
      A new figure.

    Source: Figure 5 of Zhou et al., ICLR 2021.
    """
    taps = np.asarray(mask)
    if taps.ndim != 4:
        raise ValueError(f"a convolution kernel's mask has 4 axes (HWIO), got shape {taps.shape}")
    inputs = range(min(8, taps.shape[2])) if inputs is None else inputs
    outputs = range(min(16, taps.shape[3])) if outputs is None else outputs
    from matplotlib.figure import Figure

    # Without pyplot, which would keep the figure open and show it twice in a notebook.
    figure = Figure(figsize=(0.55 * len(outputs) + 0.7, 0.55 * len(inputs) + 0.6))
    # Fixed margins, because automatic layout is slow for this many axes.
    edges = {"left": 0.08, "right": 0.99, "top": 0.93, "bottom": 0.08}
    room = {**edges, "wspace": 0.15, "hspace": 0.15}
    grid: Any = figure.subplots(len(inputs), len(outputs), squeeze=False, gridspec_kw=room)
    for row, i in enumerate(inputs):
        for column, o in enumerate(outputs):
            ax = grid[row, column]
            ax.imshow(taps[:, :, i, o], cmap="Greys", vmin=0, vmax=1.2, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(visible=True, color="0.7", linewidth=0.6)
            ax.grid(visible=False)
            if row == 0:
                ax.set_title(f"{o}", fontsize=7, pad=3)
            if column == 0:
                ax.set_ylabel(f"{i}", fontsize=7, rotation=0, va="center", labelpad=8)
    figure.supxlabel("output channel", fontsize=8)
    figure.supylabel("input channel", fontsize=8)
    return figure


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


def _standard_error(runs: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the first axis; zero for a single run."""
    # ddof=1 would divide 0 by 0 for a single run.
    return runs.std(axis=0, ddof=min(1, len(runs) - 1)) / np.sqrt(len(runs))


def _draw_chance(ax: Axes, density: float, *, vertical: bool) -> None:
    """Draws a line at the SAD of two unrelated masks of this density."""
    draw = ax.axvline if vertical else ax.axhline
    # An entry differs if exactly one of two independent masks keeps it.
    chance = 100 * 2 * density * (1 - density)
    draw(chance, color="0.5", linestyle=":", linewidth=1.2, label="unrelated masks")

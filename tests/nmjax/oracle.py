"""Which channels each weight connects, found by differentiating the layer itself."""

import math

import jax
import numpy as np

from nmjax.layouts import Unknown


def connections(layer, weight, x, positions=()):
    """For a bilinear `layer(weight, x)`: a boolean array of what each weight connects.

    Args:
      layer: `(weight, x) -> outputs`.
      weight: random weights.
      x: a random input without a batch.
      positions: spatial axes of x and of the outputs.

    Returns:
      Shape (output positions, outputs, input positions, inputs, *weight.shape).
    """
    y_shape = jax.eval_shape(layer, weight, x).shape

    def outputs(flat_weight, flat_x):
        return layer(flat_weight.reshape(weight.shape), flat_x.reshape(x.shape)).ravel()

    slopes = jax.jit(jax.jacfwd(jax.jacfwd(outputs, 0), 1))(weight.ravel(), x.ravel())
    met = np.asarray(slopes).transpose(0, 2, 1) != 0
    assert met.any()
    return split(met, y_shape, x.shape, weight.shape, positions)


def split(met, y_shape, x_shape, weight_shape, positions=()):
    """Splits (outputs, inputs, weights) into positions and channels."""
    met = met.reshape(*y_shape, *x_shape, *weight_shape)
    x_axes = [len(y_shape) + axis for axis in range(len(x_shape))]
    y_positions, x_positions = list(positions), [x_axes[axis] for axis in positions]
    y_channels = [axis for axis in range(len(y_shape)) if axis not in positions]
    x_channels = [axis for axis in x_axes if axis not in x_positions]
    weight_axes = range(len(y_shape) + len(x_shape), met.ndim)
    sizes = [
        math.prod(met.shape[axis] for axis in axes)
        for axes in (y_positions, y_channels, x_positions, x_channels)
    ]
    order = [*y_positions, *y_channels, *x_positions, *x_channels, *weight_axes]
    return met.transpose(order).reshape(*sizes, *weight_shape)


def disagreement(found, met, *, groups=1, taps=1):
    """Why what `layouts` found for a layer is wrong, by its connections; empty if it is not.

    Args:
      found: axes, a reason to stay dense, or `Unknown`, which is never wrong.
      met: from `connections`.
      groups: in how many groups of channels the layer works.
      taps: how many taps an output has at most.
    """
    if isinstance(found, Unknown):
        return ""
    if isinstance(found, str):
        weights_per_output = met.any(axis=(2, 3)).sum(axis=tuple(range(2, met.ndim - 2)))
        right = found == "one input per output" and weights_per_output.max() <= taps
        return "" if right else f"dense: {found}"
    by_output, by_input = met.any(axis=(0, 2, 3)), met.any(axis=(0, 1, 2))
    shape = met.shape[4:]
    reduction = math.prod(shape[axis] for axis in found.reduction)
    outputs = math.prod(shape[axis] for axis in found.output)
    named = {*found.reduction, *found.output, *(found.taps or ())}
    stack = [axis for axis in range(-len(shape), 0) if axis not in named]
    counts = {
        "input meets one index of the reduction": (by_input, found.reduction, 1),
        "output meets all of the reduction": (by_output, found.reduction, reduction),
        "output meets one index of the outputs": (by_output, found.output, 1),
        "input meets all outputs of its group": (by_input, found.output, outputs // groups),
    }
    counts |= {
        f"output meets all taps ({a})": (by_output, (a,), shape[a]) for a in found.taps or ()
    }
    if found.taps is not None:
        counts |= {f"output meets one layer ({a})": (by_output, (a,), 1) for a in stack}
    return ", ".join(
        f"not each {claim}"
        for claim, (rows, axes, count) in counts.items()
        if set(_indices(rows, axes)) != {count}
    )


def _indices(rows, axes):
    """For each row (one channel, *weight.shape): the number of indices along `axes` it meets."""
    ndim = rows.ndim - 1
    first = tuple(1 + ndim + axis for axis in axes)
    others = tuple(axis for axis in range(1, ndim + 1) if axis not in first)
    return rows.any(axis=others).reshape(len(rows), -1).sum(axis=1).tolist()

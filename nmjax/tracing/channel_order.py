"""Reorders the channels of a network without changing its function.

1xN patterns keep or drop N consecutive output channels together, so it matters which channels are
neighbors. Sorting a layer's output channels by their L1 norm puts large ones next to each other.
Everything that reads or rescales these channels must follow: biases, normalizations, their running
statistics, and the input channels of the next layers. Layers that add into the same stream, as in
residual networks, share one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.trees.leaves import map_named, named_leaves

LeafAxis = tuple[str, int]


@dataclass(frozen=True)
class Channels:
    """Channels that share one order, and the axes of a network's leaves that run along them.

    Attributes:
      writers: (leaf name, axis) of the kernels that produce the channels. Their norms rank them.
      followers: (leaf name, axis) of everything else along them: biases, scales, running
        statistics, and the inputs of the kernels that read them.
    """

    writers: tuple[LeafAxis, ...]
    followers: tuple[LeafAxis, ...] = ()

    def __post_init__(self) -> None:
        for field in ("writers", "followers"):
            axes = getattr(self, field)
            if not isinstance(axes, tuple) or not all(map(_is_leaf_axis, axes)):
                raise TypeError(
                    f"{field} must be a tuple of (leaf name, axis), such as "
                    f'(("layer/kernel", -1),); got {axes!r}'
                )


def _is_leaf_axis(given: Any) -> bool:
    is_pair = isinstance(given, tuple) and len(given) == 2
    return is_pair and isinstance(given[0], str) and hasattr(given[1], "__index__")


def l1_order(variables: Any, channels: Channels) -> jax.Array:
    """Returns the order that sorts channels by the L1 norm of their filters, largest first.

    Args:
      variables: parameters, or Flax variables with other collections.
      channels: channels of that tree. If several kernels write them, their norms are added.

    Returns:
      int32 (count,), the channels in their new order. Equal norms keep their order.

    Raises:
      ValueError: a name is not in the tree, an axis is not in its leaf, or sizes differ.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022, section
    3.3, filter rearrangement.

    >>> variables = {"kernel": jnp.array([[1.0, -5.0, 3.0]])}
    >>> l1_order(variables, Channels((("kernel", -1),))).tolist()
    [1, 2, 0]
    """
    leaves = named_leaves(variables)
    _check(leaves, channels)
    if not channels.writers:
        raise ValueError("channels without writers have no norms to sort by")
    norms = [_norms(leaves[name], axis) for name, axis in channels.writers]
    # A stable sort of the negated norms keeps equal channels in order.
    return jnp.argsort(-sum(norms[1:], norms[0]), stable=True).astype(jnp.int32)


def permute_channels(
    variables: Any, channels: Channels, order: jax.Array | np.ndarray | Sequence[int]
) -> Any:
    """Puts the channels of a network into another order.

    Args:
      variables: as in `l1_order`.
      channels: every leaf axis that runs along them. If one is missing, the network's function
        changes.
      order: (count,), a permutation of 0 ... count - 1: the channels in their new order.

    Returns:
      The same tree. Leaves that `channels` does not name are unchanged.

    Raises:
      ValueError: as in `l1_order`; or `order` is not a permutation.

    >>> variables = {"first": jnp.array([[1.0, 2.0]]), "second": jnp.array([[3.0], [4.0]])}
    >>> channels = Channels((("first", -1),), (("second", -2),))
    >>> permute_channels(variables, channels, [1, 0])["second"].tolist()
    [[4.0], [3.0]]
    """
    count = _check(named_leaves(variables), channels)
    # Under jit or vmap the order has no values yet that could be checked.
    is_traced = isinstance(order, jax.core.Tracer)
    if not is_traced and (
        isinstance(order, Mapping)
        or np.asarray(order).dtype.kind not in "iu"
        or sorted(np.ravel(order).tolist()) != list(range(count))
    ):
        raise ValueError(f"the order must contain each of 0 ... {count - 1} once, got {order}")
    axes: dict[str, list[int]] = {}
    for name, axis in (*channels.writers, *channels.followers):
        axes.setdefault(name, []).append(axis)

    def permute(name: str, leaf: Any) -> Any:
        # A kernel whose inputs and outputs are the same channels is reordered along both axes.
        for axis in axes.get(name, ()):
            leaf = jnp.take(leaf, jnp.asarray(order), axis=axis)
        return leaf

    return map_named(permute, variables)


def sort_channels(variables: Any, groups: Sequence[Channels]) -> Any:
    """Sorts the channels of each group by L1 norm, largest first.

    Arguments and errors as in `l1_order` and `permute_channels`, for each group.
    """
    if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
        raise TypeError(
            "groups must be a list of nmjax.Channels, as nmjax.find_channels(forward, variables, "
            f"x) returns it; got {type(groups).__name__}"
        )
    for channels in groups:
        variables = permute_channels(variables, channels, l1_order(variables, channels))
    return variables


def _norms(kernel: jax.Array, axis: int) -> jax.Array:
    others = tuple(a for a in range(kernel.ndim) if a != axis % kernel.ndim)
    return jnp.sum(jnp.abs(kernel.astype(jnp.float32)), axis=others)


def _check(leaves: dict[str, Any], channels: Channels) -> int:
    """Returns the number of channels; raises ValueError if the leaves do not agree on it."""
    if not isinstance(channels, Channels):
        raise TypeError(
            "expected nmjax.Channels, as nmjax.find_channels(forward, variables, x) lists them; "
            f"got {type(channels).__name__}"
        )
    sizes: dict[str, int] = {}
    for name, axis in (*channels.writers, *channels.followers):
        if name not in leaves:
            raise ValueError(f"no leaf is named {name!r}; the leaves are {', '.join(leaves)}")
        if not hasattr(leaves[name], "shape"):
            raise TypeError(f"{name} must be an array, got {type(leaves[name]).__name__}")
        shape = leaves[name].shape
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{name} of shape {shape} has no axis {axis}")
        sizes[f"{name} of shape {shape} along axis {axis}"] = shape[axis]
    if len(set(sizes.values())) != 1:
        raise ValueError(
            "leaves that share an order must have the same number of channels, but there are\n"
            + "\n".join(f"  {size} in {what}" for what, size in sizes.items())
        )
    return next(iter(sizes.values()))

"""Reorders the free channels of a network so that its N:M plan keeps more.

The channels between two layers may be in any order, if every leaf along them follows. The order of
the inputs decides which weights share a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.patterns.nm import NM
from nmjax.plans import LeafPlan, Plan, check_plan
from nmjax.post_training.matrices import Matrices
from nmjax.post_training.ordering.permutation import permute_inputs
from nmjax.post_training.statistics import Statistics
from nmjax.tracing.channel_order import Channels, permute_channels
from nmjax.tracing.channels import find_channels
from nmjax.trees.leaves import named_leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Variables = TypeVar("Variables")


def reorder_channels(
    forward: Callable[..., Any],
    variables: Variables,
    plan: Plan,
    *inputs: Any,
    window: int | None = None,
    statistics: Statistics | None = None,
) -> Variables:
    """Puts the channels of a network into orders under which an N:M plan keeps a higher score.

    The network's function stays the same, to rounding, and so does its speed. The traced program
    shows which channels are free: those of hidden layers and of values in attention, and the
    channels of convolutions; in residual networks all that add into one stream share an order.
    Each set of channels takes the order that `permute_inputs` finds for all planned weights that
    read it, if that keeps more; otherwise it stays.

    Reorder before you prune. Statistics of the activations belong to the old order: collect them
    again for the methods that need them.

    Args:
      forward: the network's forward pass in evaluation, `forward(variables, *inputs)`; it is
        traced, not run.
      variables: every array that runs along channels, including running statistics.
      plan: from `nmjax.make_plan`, of these variables or of their collection "params". Only N:M of
        consecutive weights depends on the order; other leaves follow.
      *inputs: the network's inputs: arrays or ShapeDtypeStructs.
      window: as in `permute_inputs`.
      statistics: from `collect`; the score is then that of `wanda`, and otherwise the magnitude.

    Returns:
      The same tree with its channels in other orders.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: no leaf of the plan is in `variables`; a leaf has no statistics; scores are not
        finite; as in `permute_inputs`.

    >>> import nmjax
    >>> hidden = jnp.array([[5.0], [4.0], [3.0], [2.0], [1.0], [1.0], [1.0], [1.0]])
    >>> params = {"first": jnp.ones((3, 8)), "second": hidden}
    >>> forward = lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"]
    >>> x = jnp.ones((1, 3))
    >>> rules = {"first": None}
    >>> plan = nmjax.make_plan(params, "2:4", rules=rules, forward=forward, inputs=(x,))
    >>> better = reorder_channels(forward, params, plan, x)
    >>> [float(nmjax.prune(p, plan)["second"].sum()) for p in (params, better)]
    [11.0, 14.0]

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, section 4. Ours
    takes the ties from the traced program instead of the names of a graph's operations.
    """
    check_plan(plan)
    leaves = named_leaves(variables)
    planned = {name: leaf for name in leaves if (leaf := _leaf_of(name, plan)) is not None}
    if not planned:
        raise ValueError(
            f"the plan names no leaf of the variables: it has {', '.join(plan)}, and they have "
            f"{', '.join(leaves)}"
        )
    scores = {name: _scores(name, leaves[name], planned[name], statistics) for name in planned}
    for channels in find_channels(forward, variables, *inputs):
        order = _best_order(channels, planned, scores, window)
        if order is not None:
            # A leaf may be along several sets, so its scores move with it.
            mine = {*channels.writers, *channels.followers}
            moved = Channels(tuple(axis for axis in mine if axis[0] in scores))
            scores = permute_channels(scores, moved, order)
            variables = permute_channels(variables, channels, order)
    return variables


def _leaf_of(name: str, plan: Plan) -> LeafPlan | None:
    """The plan of a leaf by its name, also if the plan is of the collection "params" alone."""
    return plan.get(name) or plan.get(name.removeprefix("params/"))


def _scores(
    name: str, w: jax.Array, leaf: LeafPlan, statistics: Statistics | None
) -> Float[Array, "*shape"]:
    magnitudes = jnp.abs(jnp.asarray(w, jnp.float32))
    if statistics is None:
        return magnitudes
    key = name if name in statistics else name.removeprefix("params/")
    if key not in statistics:
        raise ValueError(f"there are no statistics of {name}; collect them with the same plan")
    view = Matrices(leaf, magnitudes.shape, statistics.rows[key].shape[-1])
    root = jnp.sqrt(statistics.mean_square(key))[..., None]
    return view.back(view.of(magnitudes) * root)


def _best_order(
    channels: Channels,
    planned: Mapping[str, LeafPlan],
    scores: Mapping[str, jax.Array],
    window: int | None,
) -> np.ndarray | None:
    """An order of channels under which their readers keep more; None if none was found."""
    matrices: dict[NM, list[np.ndarray]] = {}
    for pattern, matrix in _readers(channels, planned, scores):
        matrices.setdefault(pattern, []).append(matrix)
    if not matrices:
        return None
    joined = {pattern: np.concatenate(found, axis=1) for pattern, found in matrices.items()}
    # The search knows one pattern. The one with the most weights leads, and all are counted.
    leading = max(joined, key=lambda pattern: joined[pattern].size)
    order = np.asarray(permute_inputs(joined[leading], leading, _fitting(window, joined[leading])))
    before, after = (
        sum(_kept(matrix[rows], pattern) for pattern, matrix in joined.items())
        for rows in (np.arange(len(order)), order)
    )
    return order if after > before else None


def _readers(
    channels: Channels, planned: Mapping[str, LeafPlan], scores: Mapping[str, jax.Array]
) -> Iterator[tuple[NM, np.ndarray]]:
    """The pattern and the scores (channels, others) of each weight whose groups run along them."""
    for name, axis in (*channels.writers, *channels.followers):
        leaf = planned.get(name)
        # Of inputs along several axes, groups run along the last, unless it is shorter than one.
        if leaf is None or not leaf.reduction_axes or leaf.reduction_axes[-1] != axis:
            continue
        pattern = leaf.pattern
        if isinstance(pattern, NM) and pattern.stride == 1 and pattern.n < pattern.m:
            matrix = np.moveaxis(np.asarray(scores[name], np.float64), axis, 0)
            if len(matrix) % pattern.m == 0 and len(matrix) > pattern.m:
                yield pattern, matrix.reshape(len(matrix), -1)


def _kept(matrix: np.ndarray, pattern: NM) -> float:
    groups = matrix.reshape(-1, pattern.m, matrix.shape[1])
    highest = np.partition(groups, pattern.m - pattern.n, axis=1)[:, pattern.m - pattern.n :]
    return float(highest.sum())


def _fitting(window: int | None, matrix: np.ndarray) -> int | None:
    """The window, or pairs where there are fewer channels than it holds."""
    return None if window is not None and window > len(matrix) else window

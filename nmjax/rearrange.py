"""Filter rearrangement: output channels sorted by size, so that blocks hold filters of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nmjax.channels import Channels, tied_channels
from nmjax.patterns import Block1xN
from nmjax.plans import Plan
from nmjax.sparsify import planned_leaves
from nmjax.trees import named_leaves


def rearrange_filters(
    forward: Callable[..., Any], params: Any, state: Any, *inputs: Any, plan: Plan
) -> tuple[Any, Any]:
    """Sorts the output channels of layers with blocks by the L1 norm of their filters, descending.

    The channels are really moved, together with everything that is tied to them: normalisation
    and its statistics, depthwise kernels, the inputs of the layers that follow, and all layers that
    are added up in a residual network, whose norms are then summed. So the network computes what
    it did before, up to the order in which sums are rounded. Channels whose order is fixed, such as
    logits, stay where they are, as do those that an operation mixes that this function does not
    know (`nmjax.channels`).

    Rearrange a trained network, then take its masks and fine-tune. It is meant for patterns whose
    blocks compete within the layer (`uniform=False`): rows of small filters then drop more. Where
    every row drops the same number, large filters lose: they choose inputs among themselves, while
    next to small ones they had chosen alone.

    Args:
      forward: the network's forward pass as in evaluation, `forward(params, state, *inputs)`; it is
        traced and not run.
      params: parameters that fit the plan.
      state: what else follows the channels, such as running statistics; `{}` if nothing does.
      *inputs: the network's inputs, arrays or ShapeDtypeStructs.
      plan: whose leaves with blocks are to be sorted.

    Returns:
      Parameters and state, rearranged.

    Raises:
      ValueError: `params` do not fit the plan.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022, section
    3.3. The released code sorts layer by layer and only to take the masks, scattering those back;
    in ResNet-50 it sorts projections but not the layers they are added to, an order that no network
    can be stored in. Here what is added up shares one order.

    >>> import nmjax
    >>> params = {"a": jnp.array([[1.0, 3.0, 2.0, 4.0]]), "b": jnp.arange(8.0).reshape(4, 2)}
    >>> plan = nmjax.make_plan(params, "1x2@0.5", include="a", axes={"a": 0})
    >>> forward = lambda params, state, x: jnp.tanh(x @ params["a"]) @ params["b"]
    >>> sorted_params, _ = rearrange_filters(forward, params, {}, jnp.ones((1, 1)), plan=plan)
    >>> sorted_params["a"].tolist(), sorted_params["b"][:, 0].tolist()
    ([[4.0, 3.0, 2.0, 1.0]], [6.0, 2.0, 4.0, 0.0])
    """
    leaves, structure = jax.tree.flatten((params, state))
    planned_leaves(params, plan)
    outputs = _output_axes(params, plan)
    free = tied_channels(lambda tree, *args: forward(*tree, *args), (params, state), *inputs)
    for channels in free:
        norm = _filter_norms(leaves, channels, outputs)
        if norm is None:
            continue
        order = jnp.argsort(-norm, stable=True)
        for leaf, axis in channels.axes:
            leaves[leaf] = jnp.take(leaves[leaf], order, axis=axis)
    return jax.tree.unflatten(structure, leaves)


def _output_axes(params: Any, plan: Plan) -> dict[int, int]:
    """Position of each leaf with blocks in tree order -> its one output axis, not negative."""
    return {
        position: plan[name].output_axes[0] % leaf.ndim
        for position, (name, leaf) in enumerate(named_leaves(params).items())
        if name in plan
        and isinstance(plan[name].pattern, Block1xN)
        and len(plan[name].output_axes) == 1
    }


def _filter_norms(
    leaves: list[Any], channels: Channels, outputs: dict[int, int]
) -> jax.Array | None:
    """The L1 norm of all filters that make each channel; None if no leaf with blocks makes it."""
    norms = [
        jnp.sum(jnp.abs(leaves[leaf]), axis=[a for a in range(leaves[leaf].ndim) if a != axis])
        for leaf, axis in channels.axes
        if outputs.get(leaf) == axis
    ]
    return sum(norms[1:], norms[0]) if norms else None

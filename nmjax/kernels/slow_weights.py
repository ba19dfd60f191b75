"""Packed weights that have no fast product on this machine: unpack them before serving."""

from __future__ import annotations

from typing import Any

import jax

from nmjax.kernels.matmul import choose
from nmjax.masks.arguments import is_integer
from nmjax.packed.weight import is_packed
from nmjax.ste import check_has_values


def unpack_slow(packed: Any, *, rows: int = 1) -> Any:
    """Unpacks the weights that have no product faster than the dense one on this platform.

    Call it once before serving: `packed_matmul` would unpack these weights in each call.

    Args:
      packed: a tree with packed leaves.
      rows: how many rows a product multiplies at a time: the batch, times the output's pixels.

    Returns:
      The same tree, with those leaves dense and their pruned weights zero.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.ones((8, 6))}
    >>> plan = nmjax.make_plan(params, "7:8")
    >>> packed = nmjax.pack(nmjax.prune(params, plan), plan)
    >>> unpack_slow(packed)["kernel"].shape
    (8, 6)
    """
    if isinstance(rows, bool) or not is_integer(rows) or rows < 1:
        raise ValueError(f"rows must be a positive integer, got {rows!r}")

    def is_slow(leaf: Any) -> bool:
        if not is_packed(leaf):
            return False
        check_has_values(leaf.values, "the values of a packed weight")
        # The choice needs shapes only, and those of one layer.
        layer = jax.eval_shape(lambda leaf: leaf.first_layer(), leaf)
        # Platforms other than the one it was chosen for unpack.
        return choose(leaf.dtype, layer, rows).only_on != jax.default_backend()

    return jax.tree.map(
        lambda leaf: leaf.unpack() if is_slow(leaf) else leaf, packed, is_leaf=is_packed
    )

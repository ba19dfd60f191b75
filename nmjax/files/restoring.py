"""Puts named leaves from a file into a tree with a structure of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from nmjax.packed.weight import is_packed
from nmjax.tables import printable
from nmjax.trees.leaves import is_array, is_random_key, map_named, named_leaves

Tree = TypeVar("Tree")

_LISTED = 20  # Names in a message.


def restore_like(like: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Replaces the arrays of a tree by leaves of the same names, shapes and dtypes.

    Args:
      like: a tree; leaves that are neither arrays nor random keys are kept.
      leaves: by name, packed or not.

    Raises:
      ValueError: the names, shapes or dtypes differ. The message lists them.
    """
    wanted = {
        name: leaf
        for name, leaf in named_leaves(like, is_leaf=is_packed).items()
        if is_packed(leaf) or is_array(leaf) or is_random_key(leaf)
    }
    complaints = [
        *(f"{name} is missing in the file" for name in wanted if name not in leaves),
        *(f"{printable(name)} is only in the file" for name in leaves if name not in wanted),
        *(
            f"{name}: like= has {_described(wanted[name])}, the file has {_described(leaves[name])}"
            for name in wanted.keys() & leaves.keys()
            if _described(wanted[name]) != _described(leaves[name])
        ),
    ]
    both = wanted.keys() & leaves.keys()
    if any(_dtype(wanted[name]) != _dtype(leaves[name]) for name in both):
        advice = "\nPass like= with the dtypes of the file, and cast what load_packed returns."
    else:
        advice = ""
    if complaints:
        lines = sorted(complaints)[:_LISTED]
        more = len(complaints) - len(lines)
        raise ValueError(
            "its leaves are not those of like=:\n"
            + "\n".join(f"  {line}" for line in lines)
            + (f"\n  and {more} more" if more else "")
            + advice
        )
    return map_named(
        lambda name, leaf: leaves[name] if name in wanted else leaf, like, is_leaf=is_packed
    )


def _described(leaf: Any) -> str:
    # The dtype of a random key names its generator, whose keys give other numbers.
    kind = f"a random key ({leaf.dtype})" if is_random_key(leaf) else str(_dtype(leaf))
    return f"{kind} of shape {tuple(np.shape(leaf))}"


def _dtype(leaf: Any) -> Any:
    # Without x64, 64-bit integers of the file have become 32-bit ones; `like` may be of NumPy.
    return leaf.dtype if is_random_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)

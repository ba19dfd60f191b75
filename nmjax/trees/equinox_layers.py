"""Finds the layers of Equinox models by class, without importing Equinox."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import KeyPath

from nmjax.trees.leaves import leaf_name


def layer_classes(tree: Any) -> dict[str, str]:
    """Finds the layers of `equinox.nn` in a tree: name of the layer -> name of its class.

    Works for models with shapes in place of arrays, too. Subclasses that users define do not count,
    because they may store their weights differently.

    >>> layer_classes({"dense": {"kernel": 1.0}})
    {}
    """
    found: dict[str, str] = {}
    _collect(tree, (), found)
    return found


def _collect(tree: Any, above: KeyPath, found: dict[str, str]) -> None:
    # Layers contain layers: an MLP has several Linear.
    inner = jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is not tree and _is_layer(x))
    if _is_layer(tree):
        found[leaf_name(above)] = type(tree).__name__
    for path, node in inner:
        if _is_layer(node):
            _collect(node, (*above, *path), found)


def _is_layer(node: Any) -> bool:
    module: str = type(node).__module__
    return module == "equinox.nn" or module.startswith("equinox.nn.")

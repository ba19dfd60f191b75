"""Finds the modules of Equinox models by class, without importing Equinox."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.tree_util import KeyPath

from nmjax.trees.leaves import leaf_name


def layer_classes(tree: Any) -> dict[str, str]:
    """Finds the Equinox modules in a tree: name of the module -> name of its class.

    The class is empty for modules outside `equinox.nn`, subclasses of its layers included, because
    they may store their weights differently. Works for models with shapes in place of arrays, too.

    >>> layer_classes({"dense": {"kernel": 1.0}})
    {}
    """
    found: dict[str, str] = {}
    _collect(tree, (), found)
    return found


def _collect(tree: Any, above: KeyPath, found: dict[str, str]) -> None:
    # Modules contain modules: an MLP has several Linear.
    inner = jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is not tree and _is_module(x))
    if _is_module(tree):
        found[leaf_name(above)] = type(tree).__name__ if _is_from(type(tree), "nn") else ""
    for path, node in inner:
        if _is_module(node):
            _collect(node, (*above, *path), found)


def _is_module(node: Any) -> bool:
    return _is_module_class(type(node))  # type: ignore[arg-type]


@functools.lru_cache  # Asked for every node of a tree, which has few classes.
def _is_module_class(kind: type) -> bool:
    return any(base.__name__ == "Module" and _is_from(base, "_module") for base in kind.__mro__)


def _is_from(kind: type, submodule: str) -> bool:
    return f"{kind.__module__}.".startswith(f"equinox.{submodule}.")

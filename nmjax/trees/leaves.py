"""The only place that knows how parameter trees spell their paths.

A leaf's name joins the keys that lead to it: `"encoder/layer_0/kernel"`. Dicts, FrozenDicts,
lists, dataclasses and NNX states all come out alike. Boxes that hold one array (Flax's
`nn.Partitioned`, NNX's `Variable`) leave no trace in the name, so that a tree with and without
them has the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath, keystr

IsLeaf = Callable[[Any], bool]


def leaf_name(path: KeyPath) -> str:
    """The name of the leaf at `path`, as `"a/b/kernel"`.

    A trailing attribute `value` is left out: it is how boxes expose the array that they hold.
    """
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, *, is_leaf: IsLeaf | None = None) -> dict[str, Any]:
    """The leaves of `tree` by name, in tree order.

    Raises:
      ValueError: two leaves have the same name.

    >>> named_leaves({"a": {"kernel": 1}, "b": [2, 3]})
    {'a/kernel': 1, 'b/0': 2, 'b/1': 3}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
        name = leaf_name(path)
        if name in leaves:
            raise ValueError(
                f"two leaves of the parameter tree are both named {name!r}; rename one, so that "
                "path rules and masks can tell them apart"
            )
        leaves[name] = leaf
    return leaves


def map_named(
    function: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf | None = None
) -> Any:
    """Like `jax.tree.map`, with the leaf's name as the function's first argument.

    >>> map_named(lambda name, leaf: f"{name}={leaf}", {"a": {"kernel": 1}})
    {'a': {'kernel': 'a/kernel=1'}}
    """
    return jax.tree.map_with_path(
        lambda path, *leaves: function(leaf_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def nest(leaves: Mapping[str, Any]) -> Any:
    """A tree of dicts with these leaves, by name: the inverse of `named_leaves` on such trees.

    Raises:
      ValueError: a name is that of a leaf, and the beginning of another's.

    >>> nest({"a/kernel": 1, "b/0": 2})
    {'a': {'kernel': 1}, 'b': {'0': 2}}
    """
    if leaves.keys() == {""}:
        return leaves[""]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, key = name.split("/")
        folder = tree
        for part in path:
            folder = folder.setdefault(part, {})
            if not isinstance(folder, dict):
                raise ValueError(f"{name!r} lies below another leaf")
        if key in folder:
            raise ValueError(f"{name!r} is a leaf and has leaves below it")
        folder[key] = leaf
    return tree

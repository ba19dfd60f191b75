"""Names of leaves: the only place that knows how parameter trees spell their paths.

A leaf's name joins the keys that lead to it: `"encoder/layer_0/kernel"`. Names look the same for
dicts, FrozenDicts, lists, dataclasses, and NNX states. Boxes that hold one array (Flax's
`nn.Partitioned`, NNX's `Variable`) do not appear in the name, so a tree has the same names with
and without them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey, KeyPath, keystr

IsLeaf = Callable[[Any], bool]
Tree = TypeVar("Tree")

# The most levels that a name from a file may have: JAX walks trees recursively, and a forged name
# must not exhaust the stack.
DEEPEST = 64


def leaf_name(path: KeyPath) -> str:
    """The name of the leaf at `path`, such as `"a/b/kernel"`."""
    # Boxes expose the array that they hold as an attribute `value`.
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, *, is_leaf: IsLeaf | None = None) -> dict[str, Any]:
    """The leaves of `tree` by name, in tree order; raises ValueError if two have the same name.

    >>> named_leaves({"a": {"kernel": 1}, "b": [2, 3]})
    {'a/kernel': 1, 'b/0': 2, 'b/1': 3}
    """
    leaves: dict[str, Any] = {}
    with _explaining_key_errors():
        found = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    for path, leaf in found:
        name = leaf_name(path)
        if name in leaves:
            raise ValueError(
                f"two leaves of the parameter tree have the name {name!r}; rename one, because "
                "path rules and masks identify leaves by name"
            )
        leaves[name] = leaf
    return leaves


@contextlib.contextmanager
def _explaining_key_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "sorting pytree dictionary keys" not in str(error):
            raise
        raise ValueError(
            "a dict of the parameter tree has keys that cannot be sorted, such as 'kernel' and 1; "
            "use strings for all keys"
        ) from error


def map_named(
    function: Callable[..., Any], tree: Tree, *rest: Any, is_leaf: IsLeaf | None = None
) -> Tree:
    """Like `jax.tree.map`, but passes the leaf's name to the function as its first argument.

    >>> map_named(lambda name, leaf: f"{name}={leaf}", {"a": {"kernel": 1}})
    {'a': {'kernel': 'a/kernel=1'}}
    """
    with _explaining_key_errors():
        mapped: Tree = jax.tree.map_with_path(
            lambda path, *leaves: function(leaf_name(path), *leaves), tree, *rest, is_leaf=is_leaf
        )
    return mapped


def nest(leaves: Mapping[str, Any]) -> Any:
    """Builds a tree of dicts from named leaves: the inverse of `named_leaves` for such trees.

    Raises:
      ValueError: a leaf's name is also the path to another leaf.

    >>> nest({"a/kernel": 1, "b/0": 2})
    {'a': {'kernel': 1}, 'b': {'0': 2}}
    """
    if leaves.keys() == {""}:  # The tree is a single leaf.
        return leaves[""]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, key = name.split("/")
        folder = tree
        for part in path:
            folder = folder.setdefault(part, {})
            if not isinstance(folder, dict):
                raise ValueError(f"{name!r} is below another leaf")
        if key in folder:
            raise ValueError(f"{name!r} is a leaf, but other leaves are below it")
        folder[key] = leaf
    return tree


def is_random_key(leaf: Any) -> bool:
    """Whether a leaf is a key of `jax.random.key`, or the shape of one."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, or the shape of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not is_random_key(leaf)

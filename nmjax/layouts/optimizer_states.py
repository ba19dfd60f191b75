"""The states of optimizers, whose leaves repeat the names and shapes of the weights."""

from __future__ import annotations

from collections.abc import Iterable

from nmjax.layouts.names import parse_name

_STATES = {
    "acc_grads",
    "inner_opt_state",
    "opt_state",
    "opt_states",
    "optim",
    "optim_state",
    "optimizer",
    "optimizer_state",
    "optimizer_state_dict",
    "optimizer_states",
    "param_states",
}
# OPT is a language model, too.
_BESIDE_PARAMS = "opt"
# Fields of Optax's states. A numbered state with one of these may have no count.
_MOMENTS = {"nu", "trace", "sum_of_squares", "e_g", "e_x"}
_FIELDS = {*_MOMENTS, "mu", "nu_max", "v_row", "v_col", "v", "count"}

_Path = tuple[str, ...]


def optimizer_leaves(names: Iterable[str]) -> set[str]:
    """Finds the leaves that belong to the state of an optimizer.

    >>> sorted(optimizer_leaves(["params/a/kernel", "opt/0/count", "opt/0/mu/a/kernel"]))
    ['opt/0/count', 'opt/0/mu/a/kernel']
    """
    paths = {name: _path(name) for name in names}
    children: dict[_Path, set[str]] = {}
    for path in paths.values():
        for depth, key in enumerate(path):
            children.setdefault(path[:depth], set()).add(key)
    states = {path for path, keys in children.items() if _is_state(path, keys, children)}
    return {
        name
        for name, path in paths.items()
        if any(path[:depth] in states for depth in range(len(path)))
    }


def _path(name: str) -> _Path:
    leaf = parse_name(name)
    return (*leaf.module, leaf.leaf)


def _is_state(path: _Path, keys: set[str], children: dict[_Path, set[str]]) -> bool:
    *above, last = path or ("",)
    if last in _STATES or (last == _BESIDE_PARAMS and (*above, "params") in children):
        return True
    # Layers may be called `mu` or `nu`, too, but they have no count, and other layers beside them.
    if not keys <= _FIELDS:
        return False
    return len(keys) > 1 if "count" in keys else last.isdigit() and bool(keys & _MOMENTS)

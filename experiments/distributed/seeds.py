"""Several seeds of one run, trained together: a leading axis on every array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

OverSeeds = Callable[[Callable[..., Any]], Callable[..., Any]]


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `jax.vmap(function)`, but computes one seed after the other.

    On a CPU this is faster: the arrays of one small network fit its caches, and batched products
    of small matrices are slow there. A single seed skips the loop, because XLA is slow on
    convolutions inside loops on a CPU.
    """

    @wraps(function)
    def mapped(*args: Any) -> Any:
        if jax.tree.leaves(args)[0].shape[0] == 1:
            one = function(*jax.tree.map(lambda values: values[0], args))
            return jax.tree.map(lambda values: values[None], one)
        return jax.lax.map(lambda seed_args: function(*seed_args), args)

    return mapped


def across_cores(seeds: int) -> OverSeeds:
    """Returns `one_by_one` over as many CPU devices as divide the number of seeds.

    Call `use_every_core` first, or there is only one device.
    """
    # Every device takes the same number of seeds.
    devices = max(d for d in range(1, len(jax.devices()) + 1) if seeds % d == 0)
    if devices == 1:
        return one_by_one
    mesh = jax.make_mesh((devices,), ("seeds",), (jax.sharding.AxisType.Auto,))
    split = PartitionSpec("seeds")

    def split_seeds(function: Callable[..., Any]) -> Callable[..., Any]:
        mapped = one_by_one(function)
        return jax.shard_map(mapped, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)

    return split_seeds


# Cached, because programs are shared only if they are mapped by the very same function.
@lru_cache
def fastest(seeds: int) -> OverSeeds:
    """Returns the fastest way to run a function for this many seeds on this machine.

    `across_cores` on a CPU; `jax.vmap` elsewhere, where more work at once costs no more time.
    """
    return across_cores(seeds) if jax.default_backend() == "cpu" else jax.vmap


def use_every_core(cores: int) -> None:
    """Makes JAX show this many CPU devices. Call it before JAX computes anything."""
    jax.config.update("jax_num_cpu_devices", cores)


def stack(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks one batch for each seed along a new leading axis."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def one_seed(tree: Any) -> Any:
    """Gives every array of a single seed the leading axis that several have."""
    return jax.tree.map(lambda values: np.asarray(values)[None], tree)

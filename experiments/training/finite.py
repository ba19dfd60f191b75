"""Finds losses and variables that are not finite, and stops the run there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.trees.leaves import named_leaves

_ADVICE = "Try a lower learning rate, a longer warm-up, or a smaller |lambda_w|"


def first_bad_leaf(params: Any, collections: Mapping[str, Any]) -> jax.Array:
    """Returns the index of the first variable that is not finite, in order of `_names`; or -1."""
    leaves = [*named_leaves(params).values(), *named_leaves(collections).values()]
    bad = jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def check_finite(
    bad_steps: Any, bad_leaves: Any, train: Any, seeds: Sequence[int], steps_per_epoch: int
) -> None:
    """Raises FloatingPointError if a loss or a variable is not finite.

    Args:
      bad_steps: the first step whose loss was not finite, or -1; for each seed if there are
        several.
      bad_leaves: from `first_bad_leaf`.
      train: the `TrainState` that both were found in.
      seeds: of the run.
      steps_per_epoch: optimizer steps in an epoch.
    """
    for seed, step, leaf in zip(seeds, np.ravel(bad_steps), np.ravel(bad_leaves), strict=True):
        if step < 0 and leaf < 0:
            continue
        name = _names(train.params, train.collections)[leaf] if leaf >= 0 else ""
        if step >= 0:
            epoch = f"(epoch {step // steps_per_epoch + 1}, {steps_per_epoch} steps each)"
            found = f"the loss of seed {seed} is not finite from step {step} on {epoch}"
            found += f", and {name} is the first variable that is not finite" if name else ""
        else:
            done = int(np.ravel(jax.device_get(train.step))[0])
            found = f"{name} of seed {seed} is not finite after {done} steps"
        raise FloatingPointError(f"{found}: training stopped; this state is not saved. {_ADVICE}")


def _names(params: Any, collections: Mapping[str, Any]) -> list[str]:
    return [*named_leaves(params), *named_leaves(collections)]

"""Transformations, trees and assertions that the tests of optax conformance share.

A new transformation joins by one row in `TRANSFORMATIONS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nmjax


class Row(NamedTuple):
    """A transformation of a plan and one number that may be a schedule."""

    make: Callable[..., optax.GradientTransformationExtraArgs]
    number: str  # the argument's name
    value: float


TRANSFORMATIONS = {
    "add_sparse_refined": Row(nmjax.add_sparse_refined, "lambda_w", 0.3),
}

RNG = np.random.default_rng(0)


def make_params(dtype="float32"):
    """Two planned leaves, and 1-D, complex and scalar leaves that are not."""

    def normal(*shape):
        return jnp.asarray(RNG.normal(size=shape), dtype)

    return {
        "a": {"kernel": normal(16, 4), "bias": normal(4)},
        "b": {"kernel": normal(8, 8)},
        "phase": jnp.asarray(RNG.normal(size=3) + 1j * RNG.normal(size=3), "complex64"),
        "temperature": normal(),
    }


PARAMS = make_params()
GRADS = make_params()
# Without the complex leaf, for wrappers of optax that cast every leaf to one real dtype.
REAL_PARAMS, REAL_GRADS = ({k: tree[k] for k in ("a", "b")} for tree in (PARAMS, GRADS))
PLAN = nmjax.make_plan(PARAMS, "2:4")
OTHER_MASKS = {name: ~mask for name, mask in nmjax.compute_masks(PARAMS, PLAN).items()}


def apply(tx, params=PARAMS, grads=GRADS, steps=1, **extra_args):
    """The updates of the last of `steps` steps with the same parameters and gradients."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, **extra_args)
    return updates


def assert_trees_equal(a, b):
    chex.assert_trees_all_equal(a, b)


def assert_trees_close(a, b, rtol=1e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol)


def types(tree):
    """Shapes, dtypes, weak types and shardings."""
    return jax.tree.map(lambda x: (jax.typeof(x), x.weak_type), tree)


def assert_changed(updates, grads=GRADS, leaves=("a", "b")):
    for leaf in leaves:
        assert not np.array_equal(updates[leaf]["kernel"], grads[leaf]["kernel"])

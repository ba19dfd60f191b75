"""An independent way to find the axes that a network sums over: the rank of its gradients.

A layer that computes `y[o] = sum_r x[r] w[r, o]` at p positions has the gradient
`dL/dw[r, o] = sum_p x_p[r] g_p[o]` for any loss L. The inputs x_p do not depend on the loss; the
gradients g_p do. So the gradients of many random losses, written side by side with one row for each
r, have rank p at most. With one row for each o, or for any other set of axes, they have a much
higher rank. The oracle looks for that set of axes. It knows neither names nor programs.

It needs a network with fewer positions than half the inputs of each layer: batches of one, a few
tokens, images of one pixel. Attention needs as many tokens as a head has features, since the
gradients of its queries are combinations of the keys. The oracle says `Undecided` if two sets of
axes look alike.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.trees.leaves import named_leaves

LOSSES = 32
ROWS, COLUMNS = 96, 192  # A random part of a larger matrix has the same low rank.
ZERO = 1e-6  # Gradients this much smaller than the largest one are rounding errors.
# Compiling takes far longer than running such small networks.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # The newest XLA does not know this option.
    QUICK["xla_cpu_use_fusion_emitters"] = False
SMALL = 1e-4  # Singular values this much smaller than the largest one do not count.


class Undecided(Exception):
    """Two different sets of axes explain the gradients equally well."""


class Product(NamedTuple):
    """The axes of a weight's product, as negative numbers.

    Attributes:
      summed: axes that the product sums over, taps that the input reaches included.
      stack: axes along which the inputs differ, such as layers or experts.
    """

    summed: tuple[int, ...]
    stack: tuple[int, ...]


def randomized(params, seed=0):
    """Adds noise to the floating leaves, so that no zero or symmetric start hides a product."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        scale = 0.5 / np.sqrt(max(leaf.shape[-2:], default=1))
        return leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(noisy, params)


def find_products(forward, params, *inputs, seed=0):
    """Leaf name -> its `Product`, None if it is in no product, or `Undecided`; floats only."""
    numbers = {
        int(number)
        for leaf in jax.tree.leaves(inputs)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.integer)
        for number in np.ravel(leaf)
    }
    found = {}
    for name, gradients in _gradients(forward, params, inputs, seed).items():
        try:
            found[name] = _product(_without_lookups(gradients, numbers))
        except Undecided as error:
            found[name] = error
    return found


def _gradients(forward, params, inputs, seed):
    """Leaf name -> gradients of random losses, with one axis more, for each floating leaf."""
    leaves, treedef = jax.tree.flatten(params)
    names = list(named_leaves(params))
    is_float = [
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves
    ]

    def outputs(floats):
        floats = iter(floats)
        both = [next(floats) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)]
        results = jax.tree.leaves(forward(jax.tree.unflatten(treedef, both), *inputs))
        return [y for y in results if hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.floating)]

    def run(floats):
        ys, pull = jax.vjp(outputs, floats)
        keys = jax.random.split(jax.random.key(seed), len(ys))
        losses = [
            jax.random.normal(key, (LOSSES, *y.shape), y.dtype)
            for key, y in zip(keys, ys, strict=True)
        ]
        return jax.vmap(pull)(losses)[0]

    floats = [jnp.asarray(leaf) for leaf, f in zip(leaves, is_float, strict=True) if f]
    names = [name for name, f in zip(names, is_float, strict=True) if f]
    gradients = jax.jit(run, compiler_options=QUICK)(floats)
    return {n: np.asarray(g, np.float64) for n, g in zip(names, gradients, strict=True)}


def _without_lookups(gradients, numbers):
    """Leaves out the entries that a look-up of the input's numbers may reach.

    What is left of a tied embedding is its product. Other weights lose a few entries.
    """
    for axis, size in enumerate(gradients.shape[1:], 1):
        kept = [i for i in range(size) if i not in numbers]
        if max(numbers, default=size) < size:
            gradients = np.take(gradients, kept, axis)
    return gradients


def _product(gradients):
    ndim = gradients.ndim - 1
    gradients = _reached(gradients)
    axes = [axis for axis in range(1, ndim + 1) if gradients.shape[axis] > 1]
    if gradients.size == 0:
        return None
    ranks = {}
    # All axes together give a row of losses for each weight, which say something of a vector only.
    for count in range(1, max(len(axes), 2)):
        for rows in itertools.combinations(axes, count):
            rank, largest = _rank(gradients, rows)
            if 2 * rank <= largest:
                ranks[rows] = rank
    if not ranks:
        return None
    summed = min(ranks, key=lambda rows: (ranks[rows], len(rows)))
    for rows, rank in ranks.items():
        if not set(summed) <= set(rows) and rank < 2 * ranks[summed]:
            raise Undecided(f"{_negative(summed, ndim)} or {_negative(rows, ndim)}")
    others = [axis for axis in axes if axis not in summed]
    stack = [axis for axis in others if _differs_along(gradients, summed, axis)]
    return Product(_negative(summed, ndim), _negative(stack, ndim))


def _reached(gradients):
    """Leaves out indices whose gradients are all zero: taps that only meet the padding."""
    size = np.abs(gradients)
    # An axis at a time, since the layers of a stack may have gradients of different sizes.
    for axis in range(1, gradients.ndim):
        others = tuple(a for a in range(gradients.ndim) if a != axis)
        largest = size.max(others, initial=0)
        kept = np.flatnonzero(largest > ZERO * largest.max(initial=0))
        gradients, size = np.take(gradients, kept, axis), np.take(size, kept, axis)
    return gradients


def _rank(gradients, rows):
    """The rank of the gradients with one row for each index along `rows`, and its upper limit."""
    matrix = np.moveaxis(gradients, rows, range(len(rows)))
    matrix = matrix.reshape(np.prod(matrix.shape[: len(rows)], dtype=int), -1)
    rng = np.random.default_rng(0)
    matrix = _part(matrix.T, COLUMNS, rng).T
    matrix = _part(matrix, ROWS, rng)
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > SMALL * values[0]).sum()), min(matrix.shape)


def _part(matrix, count, rng):
    """At most `count` random rows that are not zero, with norm 1."""
    norms = np.linalg.norm(matrix, axis=1)
    nonzero = np.flatnonzero(norms > ZERO * norms.max())
    chosen = rng.permutation(nonzero)[:count]
    return matrix[chosen] / norms[chosen, None]


def _differs_along(gradients, summed, axis):
    """Whether the inputs at one index of `axis` span less than the inputs at all of them."""
    whole, _ = _rank(gradients, summed)
    return all(
        _rank(np.take(gradients, [i], axis), summed)[0] < whole
        for i in range(gradients.shape[axis])
    )


def _negative(axes, ndim):
    return tuple(axis - 1 - ndim for axis in axes)

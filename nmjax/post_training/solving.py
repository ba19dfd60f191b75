"""Applies a method to every planned weight, one matrix (in, out) after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.layouts.axes import Axes, size_along
from nmjax.masks.arguments import check_number
from nmjax.patterns.nm import NM
from nmjax.patterns.pattern import Pattern
from nmjax.plans import Plan
from nmjax.post_training.matrices import Matrices
from nmjax.post_training.statistics import Statistics
from nmjax.pruning import Masks, check_masks, planned_leaves
from nmjax.trees.leaves import map_named

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

Params = TypeVar("Params")


class Structure(NamedTuple):
    """The pattern of one matrix (in, out), whose inputs are flattened (taps, inputs).

    Attributes:
      pattern: of the weight.
      taps: how many taps there are; each has `in / taps` inputs.
    """

    pattern: Pattern
    taps: int

    def keep(self, scores: Float[Array, "in out"]) -> Bool[Array, "in out"]:
        """The mask that keeps the highest scores, or the blocks with the highest sums."""
        inputs, outputs = scores.shape
        split = scores.reshape(self.taps, inputs // self.taps, outputs)
        return self.pattern.mask(split, Axes((-2,), (-1,), (-3,)), _as_given).reshape(scores.shape)


def _as_given(scores: jax.Array) -> jax.Array:
    return scores


# A matrix (in, out), its statistic or mask or both, its structure, and settings -> a matrix.
Solve = Callable[..., jax.Array]


@partial(jax.jit, static_argnames=("solve", "structure", "settings"))
def _map_solve(
    operands: tuple[jax.Array, ...],
    *,
    solve: Solve,
    structure: Structure,
    settings: tuple[tuple[str, Any], ...],
) -> jax.Array:
    """The solutions of a stack of matrices. Jitted, so leaves of the same shape compile once."""
    # One after the other: a solver holds several arrays of the size of a Gram. In full precision:
    # TPUs would multiply in bfloat16.
    with jax.default_matmul_precision("highest"):
        return lax.map(lambda xs: solve(*xs, structure, **dict(settings)), operands)


def solved(
    params: Params,
    plan: Plan,
    solve: Solve,
    *,
    statistics: Statistics | None = None,
    gram: bool = True,
    masks: Masks | None = None,
    **settings: Any,
) -> Params:
    """The parameters after `solve(w, *[statistic], *[mask], structure)` for each planned matrix.

    Matrices are float32 or wider inside; the result has the dtype of the leaf.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`.
      solve: the method for one matrix, a function of a module.
      statistics: from `collect`; passed on if given.
      gram: whether the method needs Gram matrices, or mean squares.
      masks: leaf name -> mask; passed on if given.
      **settings: keyword arguments of `solve`, numbers.

    Raises:
      ValueError: statistics or masks are missing for a leaf or do not fit it; what a method makes
        of a Gram matrix is not finite.
      TypeError: `statistics` are not `Statistics`.
    """
    found = by_leaf(params, plan, solve, statistics=statistics, gram=gram, masks=masks, **settings)
    if statistics is not None and gram:
        _check_finite(found)
    return map_named(
        lambda name, leaf: found[name].astype(leaf.dtype) if name in found else leaf, params
    )


def by_leaf(
    params: Params,
    plan: Plan,
    solve: Solve,
    *,
    statistics: Statistics | None = None,
    gram: bool = True,
    masks: Masks | None = None,
    **settings: Any,
) -> dict[str, jax.Array]:
    """Like `solved`, but returns what `solve` returned, in the shape of each leaf, by name."""
    leaves = planned_leaves(params, plan)
    for setting, value in settings.items():
        check_number(setting, value)
    if statistics is not None:
        _check_statistics(statistics, leaves, gram)
    if masks is not None:
        check_masks(masks, leaves)
    found = {}
    for name, w in leaves.items():
        groups = 1 if statistics is None else statistics.rows[name].shape[-1]
        view = Matrices(plan[name], w.shape, groups)
        _check_fits(name, view, statistics)
        # Casts on purpose, which JAX's strict promotion would refuse; so NumPy's promotes.
        matrices = view.of(w.astype(np.promote_types(w.dtype, np.float32)))
        operands = [matrices]
        if statistics is not None:
            statistic = statistics[name] if gram else statistics.mean_square(name)
            operands.append(statistic.astype(matrices.dtype))
        if masks is not None:
            operands.append(view.of(jnp.asarray(masks[name])))
        structure = Structure(plan[name].pattern, size_along(w.shape, plan[name].tap_axes))
        count = len(matrices.shape) - 2
        flat = [x.reshape(-1, *x.shape[count:]) for x in operands]
        solutions = _map_solve(
            tuple(flat), solve=solve, structure=structure, settings=tuple(settings.items())
        )
        found[name] = view.back(solutions.reshape(matrices.shape))
    return found


def grouped_order(pattern: NM, inputs: int) -> np.ndarray:
    """The inputs in an order in which the members of each group are neighbors."""
    runs = np.arange(inputs).reshape(-1, pattern.m, pattern.stride)
    return runs.swapaxes(1, 2).ravel()


def damped(gram: Float[Array, "in in"], ridge: float) -> Float[Array, "in in"]:
    """The Gram plus `ridge` times its mean diagonal, as a singular one needs; dead inputs get 1."""
    diagonal = jnp.diagonal(gram)
    return gram + jnp.diag(jnp.where(diagonal == 0, 1, ridge * jnp.mean(diagonal)))


def normalized(
    gram: Float[Array, "in in"], ridge: float
) -> tuple[Float[Array, "in in"], Float[Array, "in 1"]]:
    """The Gram of inputs scaled to mean square 1, plus `ridge`, and the scale of each input.

    A weight of the scaled problem is the weight times the scale. Dead inputs have a tiny scale.
    """
    scale = jnp.sqrt(jnp.diagonal(gram))
    largest = jnp.max(scale)
    # Without any input that lives, all weights count alike.
    scale = jnp.where(largest > 0, jnp.maximum(scale, 1e-6 * largest), 1)[:, None]
    return gram / scale.T / scale + ridge * jnp.eye(len(gram), dtype=gram.dtype), scale


def _check_statistics(
    statistics: Statistics, leaves: Mapping[str, jax.Array], needs_gram: bool
) -> None:
    if not isinstance(statistics, Statistics):
        raise TypeError(
            "statistics must come from nmjax.post_training.collect, got "
            f"{type(statistics).__name__}"
        )
    missing = sorted(leaves.keys() - statistics.keys())
    if missing:
        raise ValueError(
            f"there are no statistics of {', '.join(missing)}; collect them with the same plan"
        )
    if needs_gram and not all(map(statistics.is_gram, leaves)):
        raise ValueError(
            'this method needs Gram matrices: collect(..., kind="gram"). Of mean squares, only '
            "wanda and ria can make use"
        )


def _check_finite(found: Mapping[str, jax.Array]) -> None:
    known = {name: x for name, x in found.items() if not isinstance(x, jax.core.Tracer)}
    flags = jax.device_get({name: jnp.isfinite(x).all() for name, x in known.items()})
    wrong = [f"  {name} {found[name].shape}" for name, is_finite in flags.items() if not is_finite]
    if wrong:
        raise ValueError(
            "the solutions for these leaves are not finite:\n"
            + "\n".join(wrong)
            + "\nTheir weights are not, or their Gram matrices are singular: pass a larger ridge=, "
            "or collect more data"
        )


def _check_fits(name: str, view: Matrices, statistics: Statistics | None) -> None:
    leaf = view.leaf
    if view.groups > 1:
        misfit = leaf.pattern.misfit(leaf.inputs, leaf.outputs // view.groups)
        if misfit:
            raise ValueError(f"{name} {view.shape}: in each feature group, {misfit}")
    if statistics is None:
        return
    expected = jax.eval_shape(view.of, jax.ShapeDtypeStruct(view.shape, jnp.float32)).shape[:-1]
    got = statistics.mean_square(name).shape
    if got != expected:
        raise ValueError(
            f"the statistics of {name} {view.shape} have the shape {got} in place of {expected}; "
            "collect them with the same plan and parameters"
        )

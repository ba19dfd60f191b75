"""Compares what nmjax says about a model's weights with the oracle."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nmjax import make_plan
from nmjax.layouts import Axes, Unknown, layouts
from nmjax.tracing.program import read_program
from nmjax.trees.leaves import named_leaves
from tests.nmjax.real_models.oracle import UndecidedError, find_products, randomized


class Model(NamedTuple):
    """A forward pass `forward(params, *inputs)` with random parameters and small inputs."""

    forward: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]

    def shapes(self):
        return {
            name: leaf.shape for name, leaf in named_leaves(self.params).items() if is_float(leaf)
        }


def is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def side_by_side(layers):
    """One model of many layers: name -> (apply, params, input), each with an input of its own."""

    def forward(params, inputs):
        return {name: apply(params[name], inputs[name]) for name, (apply, _, _) in layers.items()}

    params = {name: params for name, (_, params, _) in layers.items()}
    return Model(forward, randomized(params), ({name: x for name, (_, _, x) in layers.items()},))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def from_shapes(tree, seed=0):
    """Random parameters with the shapes and dtypes of `tree`; gains and variances near one."""
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype) if len(s.shape) < 2 else s, tree)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ones)
    return randomized(
        jax.tree.map(lambda s, zero: s if isinstance(s, jax.Array) else zero, ones, zeros), seed
    )


def check(model, *, unclear=(), tied=(), adapters=(), added=()):
    """Asserts that the program and the known layouts agree with the oracle on every leaf.

    Args:
      model: the model.
      unclear: leaves that the tracer must report as unknown, whatever the oracle says of them.
      tied: leaves that are a look-up table and are multiplied too; they stay dense.
      adapters: leaves that the known layouts leave dense, although they are multiplied.
      added: stacks of matrices, such as experts, whose products the network adds up. The oracle
        cannot see that the program multiplies first.
    """
    truth = find_products(model.forward, model.params, *model.inputs)
    uses = read_program(model.forward, model.params, *model.inputs).uses
    traced = {name: uses[name].axes() for name in truth}
    planned = _planned(model, forward=model.forward, inputs=model.inputs)
    for name, axes in planned.items():
        assert axes.reduction == traced[name].reduction, name
    unknown = {name for name, axes in traced.items() if isinstance(axes, Unknown)}
    reasons = {name: traced[name].reason for name in unknown ^ set(unclear) if name in unknown}
    assert unknown == set(unclear), reasons
    differ = functools.partial(_difference, dense=tied, added=added, shapes=model.shapes())
    assert not (wrong := _all(differ, traced, truth)), "\n".join(wrong)
    differ = functools.partial(differ, dense=(*tied, *adapters))
    # The plan knows the classes of layers too, and leaves dense what does not divide.
    known = layouts(model.shapes()) | _planned(model)
    assert not (wrong := _all(differ, known, truth)), "\n".join(wrong)


def _planned(model, **program):
    """The axes of the leaves that become sparse; a group of two divides almost any of them."""
    dense = {"on_indivisible": "dense", "on_unknown": "dense"}
    try:
        plan = make_plan(model.params, "1:2", **program, **dense)
    except ValueError as error:
        if "no leaf becomes sparse" not in str(error):
            raise
        return {}
    return {
        name: Axes(leaf.reduction_axes, leaf.output_axes, leaf.tap_axes)
        for name, leaf in plan.items()
    }


def _all(differ, found, truth):
    return [
        f"{name}: {message}"
        for name in truth
        if not isinstance(found[name], Unknown)
        and (message := differ(name, found[name], truth[name]))
    ]


def _difference(name, found, truth, *, dense, added, shapes):
    """How an answer of nmjax differs from the oracle's, or None."""
    shape = shapes[name]
    if isinstance(truth, UndecidedError):
        return f"{shape}: the oracle is undecided: {truth}"
    if isinstance(found, Axes):
        # The oracle does not see axes of size 1.
        reduction = {axis for axis in found.reduction if shape[axis] > 1}
        unseen = {axis for axis in (found.taps or ()) if shape[axis] > 1}
        if name in added:
            unseen = set(range(-len(shape), 0)) - {*found.reduction, *found.output}
        if truth and reduction <= set(truth.summed) <= reduction | unseen:
            return None
        return f"{shape}: planned as {found}, but the truth is {truth}"
    is_matrix = sum(size > 1 for size in shape) > 1
    if truth and is_matrix and name not in dense:
        return f"{shape}: dense ({found}), but the truth is {truth}"
    return None

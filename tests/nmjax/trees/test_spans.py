"""Axes taken together, against plain indexing."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.trees.spans import merge, split, stack_axes


@st.composite
def spanned(draw):
    """A shape and up to three spans of its axes, some of them empty."""
    ndim = draw(st.integers(0, 5))
    axes = draw(st.permutations(range(-ndim, 0)))
    cuts = sorted(draw(st.lists(st.integers(0, ndim), min_size=2, max_size=3)))
    spans = [tuple(axes[a:b]) for a, b in itertools.pairwise(cuts)]
    return tuple(draw(st.integers(1, 3)) for _ in range(ndim)), spans


@given(spanned())
def test_merge_by_indexing_and_back(case):
    shape, spans = case
    x = np.arange(math.prod(shape)).reshape(shape)
    merged = merge(x, spans)
    stack = [axis for axis in range(-len(shape), 0) if not any(axis in span for span in spans)]
    assert stack_axes(len(shape), spans) == [axis + len(shape) for axis in stack]
    order = [*stack, *(axis for span in spans for axis in span)]
    sizes = [shape[axis] for axis in order]
    flat = [x[tuple(i[order.index(a)] for a in range(-len(shape), 0))] for i in np.ndindex(*sizes)]
    np.testing.assert_array_equal(merged.ravel(), flat)
    assert list(merged.shape[len(stack) :]) == [math.prod(shape[a] for a in s) for s in spans]
    np.testing.assert_array_equal(split(merged, shape, spans), x)


@pytest.mark.parametrize("xp", [np, jnp])
def test_numpy_stays_numpy(xp):
    x = xp.zeros((2, 3, 4))
    assert type(merge(x, [(-1, -3)])) is type(x)
    assert merge(x, [(-1, -3)]).shape == (3, 8)
    assert type(split(merge(x, [(-1, -3)]), x.shape, [(-1, -3)])) is type(x)


def test_an_empty_span_is_an_axis_of_one():
    assert merge(np.zeros((5, 2)), [(), (-1,)]).shape == (5, 1, 2)

"""Strided groups: the consecutive groups of a weight whose inputs are permuted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax.masks.nm import nm_mask
from tests.nmjax.masks.test_nm import with_ties
from tests.nmjax.masks.test_nm_compiled import COLLECTIVES

# One n:m for each formulation of a mask.
PATTERNS = [(1, 1), (2, 4), (3, 8), (1, 16), (5, 40)]


def member_order(size, m, stride):
    """Which inputs follow each other when the members of every group come together."""
    runs = range(0, size, m * stride)
    return [run + r + k * stride for run in runs for r in range(stride) for k in range(m)]


@st.composite
def strided_weights(draw):
    n, m = draw(st.sampled_from(PATTERNS))
    stride = draw(st.sampled_from([1, 2, 3, 8]))
    ndim = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 3)) for _ in range(ndim)]
    axis = draw(st.integers(0, ndim - 1))
    shape[axis] *= m * stride
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return with_ties(rng, shape, dtype), n, m, stride, axis


@settings(max_examples=25)  # Most of them compile.
@given(strided_weights())
def test_permuting_the_inputs_makes_groups_consecutive(case):
    w, n, m, stride, axis = case
    order = member_order(w.shape[axis], m, stride)
    expected = nm_mask(w.take(jnp.array(order), axis), n, m, axis)
    mask = nm_mask(w, n, m, axis, stride=stride)
    np.testing.assert_array_equal(np.asarray(mask).take(order, axis), expected)


def qwix_mask(w, n, m, offset):
    """The rule of qwix 0.1.8 in NumPy, along the last axis, to which its `order="C"` transposes."""
    groups = np.abs(w).reshape(-1, m, offset).swapaxes(1, 2)
    best = np.argsort(-groups, axis=-1, kind="stable")[..., :n]
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, best, True, -1)
    return mask.swapaxes(1, 2).reshape(w.shape)


@pytest.mark.parametrize(("n", "m", "stride"), [(2, 4, 16), (1, 4, 8), (4, 8, 2), (2, 4, 1)])
def test_equals_the_rule_of_qwix(n, m, stride):
    w = np.random.default_rng(0).integers(-5, 6, (6, 2 * m * stride)).astype("float32")
    mask = nm_mask(w, n, m, -1, stride=stride)
    np.testing.assert_array_equal(mask, qwix_mask(w, n, m, stride))


def test_several_axes_are_flattened_first():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 5)), "float32")
    flat = nm_mask(w.reshape(32, 5), 2, 4, 0, stride=4)
    np.testing.assert_array_equal(nm_mask(w, 2, 4, (0, 1), stride=4).reshape(32, 5), flat)


@pytest.mark.parametrize("axis", [-2, -1])
def test_whole_runs_in_every_shard_need_no_communication(axis):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    w = np.random.default_rng(0).standard_normal((64, 64)).astype("float32")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P("data", "model")))
        compiled = jax.jit(lambda w: nm_mask(w, 2, 4, axis, stride=4)).lower(sharded).compile()
        assert not COLLECTIVES.findall(compiled.as_text())
        np.testing.assert_array_equal(compiled(sharded), nm_mask(w, 2, 4, axis, stride=4))
        message = r"groups of 4 with stride 8 along axis .* cross shard.* multiple of 32"
        with pytest.raises(ValueError, match=message):
            nm_mask(sharded, 2, 4, 0, stride=8)


@pytest.mark.parametrize(
    ("stride", "error", "message"),
    [
        (0, ValueError, "at least 1; got 0"),
        (2.0, TypeError, "stride must be a Python integer"),
        (True, TypeError, "stride must be a Python integer"),
        (3, ValueError, "groups of 4 with stride 3 do not fit.* have 8 .* which 12 does not"),
    ],
)
def test_bad_strides(stride, error, message):
    with pytest.raises(error, match=message):
        nm_mask(jnp.ones((8, 6)), 2, 4, stride=stride)

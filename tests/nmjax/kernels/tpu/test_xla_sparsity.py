"""The layout of XLA's own 1:N sparsity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels.tpu.xla_sparsity import from_xla, to_xla
from tests.nmjax.packed_weights import prune_and_pack


def packed(pattern, dtype=jnp.float8_e4m3fn):
    params = {"kernel": jax.random.normal(jax.random.key(0), (48, 5)).astype(dtype)}
    return prune_and_pack(params, nmjax.make_plan(params, pattern))["kernel"]


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("1:2", marks=pytest.mark.slow),
        "1:4",
        pytest.param("1:6", marks=pytest.mark.slow),
    ],
)
def test_both_ways_are_exact(pattern):
    weight = packed(pattern)
    values, positions = to_xla(weight)
    dense, m = np.zeros((48, 5), np.float32), weight.pattern.m
    for group, output in np.ndindex(*values.shape):
        dense[m * group + int(positions[group, output]), output] = values[group, output]
    np.testing.assert_array_equal(weight.unpack().astype(jnp.float32), dense)
    back = from_xla(values, positions, weight.leaf_plan)
    np.testing.assert_array_equal(back.codes, weight.codes)
    np.testing.assert_array_equal(back.values, weight.values)


@pytest.mark.parametrize("weight", [("2:4",), ("1:4", jnp.bfloat16), ("1:4/4",)])
def test_what_xla_does_not_take(weight):
    with pytest.raises(NotImplementedError, match="XLA's sparsity"):
        to_xla(packed(*weight))

"""What kernels read off packed arrays: taps, stacks of layers, one of those layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels.operands import Window, as_window
from tests.nmjax.packed_weights import prune_and_pack

SHAPES = {"dense": (16, 32), "conv_line": (3, 16, 32), "conv": (3, 3, 16, 32)}
PATTERNS = ["2:4", "2:4/kernel", "1x16@0.5", "1x16@0.5/layer"]


def layers_of(count):
    """So many layers of each kind, stacked as `nn.scan` does; one layer if count is None."""
    stack = () if count is None else (count,)
    numbers = np.random.default_rng(0)
    return {
        name: {
            "kernel": jnp.asarray(numbers.normal(size=(*stack, *shape)), jnp.float32),
            "bias": jnp.zeros((*stack, shape[-1])),
        }
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("planned", [pytest.param("stacked", marks=pytest.mark.slow), "one layer"])
def test_a_stack_is_told_from_taps(pattern, planned):
    stacks = layers_of(4)
    plan = nmjax.make_plan(stacks if planned == "stacked" else layers_of(None), pattern)
    packed = prune_and_pack(stacks, plan)
    dense = nmjax.unpack(packed)
    for name, shape in SHAPES.items():
        leaf = packed[name]["kernel"]
        if name != "dense":
            assert leaf.kernel_taps == shape[:-2]
            assert leaf.stack == (4,)
        layer = leaf.first_layer()
        assert layer.shape == shape
        np.testing.assert_array_equal(nmjax.unpack(layer), dense[name]["kernel"][0])
        assert layer.kernel_taps == shape[:-2]
        assert layer.stack == ()
        assert layer.first_layer().shape == shape
        assert jax.eval_shape(lambda packed: packed.first_layer(), leaf).shape == shape


def test_numbers_of_a_window_may_be_numpys():
    window = as_window((9, 7), (3, 3), np.array([2, 1]), np.int64(1), np.int32(1))
    assert window == Window((2, 1), ((1, 1), (1, 1)), (1, 1))
    sides = as_window((9, 7), (3, 3), 1, np.array([[0, 1], [2, 2]]), 1)
    assert sides.padding == ((0, 1), (2, 2))

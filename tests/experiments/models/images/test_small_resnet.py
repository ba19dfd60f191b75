"""Convolution by matrix product against XLA's own; the network's shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.models.images.small_resnet import SmallResNet, conv_by_matmul

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 1), (0, 2)]])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (1, 1), (2, 3)])
def test_equals_xla_convolution(strides, padding, rows, columns):
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (rows, columns, 3, 4))

    def loss(function, x, kernel):
        out = function(x, kernel, strides, padding, dimension_numbers=NHWC)
        return jnp.sum(jnp.sin(out)), out

    for function in (conv_by_matmul, lax.conv_general_dilated):
        both = jax.jit(jax.grad(lambda *a, f=function: loss(f, *a), (0, 1), has_aux=True))
        grads, out = both(x, kernel)
        if function is conv_by_matmul:
            got = *grads, out
        else:
            for ours, theirs in zip(got, (*grads, out), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_cannot_do():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    with pytest.raises(NotImplementedError, match="groups"):
        conv_by_matmul(x, kernel, (1, 1), "SAME", feature_group_count=2)
    with pytest.raises(NotImplementedError, match="dilation"):
        conv_by_matmul(x, kernel, (1, 1), "SAME", rhs_dilation=(2, 2))


def test_parameters_and_logits():
    model = SmallResNet((16, 16, 32), 10)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((2, 8, 8, 1)), True), jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 24_666
    logits = jax.eval_shape(lambda v: model.apply(v, jnp.zeros((2, 8, 8, 1)), False), shapes)
    assert logits.shape == (2, 10)

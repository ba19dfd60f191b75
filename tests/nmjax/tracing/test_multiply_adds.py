"""The counter itself; tests/nmjax/analysis/test_costs.py has the networks and the loops."""

import jax
import jax.numpy as jnp

from nmjax.tracing.multiply_adds import multiply_adds

PARAMS = {"first": jnp.ones((8, 16)), "second": jnp.ones((16, 4)), "bias": jnp.ones(4)}


def test_parameters_are_named_and_products_of_activations_are_not():
    def forward(params, x):
        hidden = x @ params["first"]
        return (hidden.T @ hidden) @ params["second"] + params["bias"][None]

    counts = multiply_adds(forward, PARAMS, jax.ShapeDtypeStruct((2, 8), jnp.float32))
    assert counts == {"first": 2 * 8 * 16, None: 16 * 2 * 16, "second": 16 * 16 * 4}


def test_a_network_without_products_has_no_counts():
    assert multiply_adds(lambda params, x: x + params["bias"], PARAMS, jnp.ones(4)) == {}


def test_the_forward_pass_is_traced_once_and_never_run():
    runs = []

    def forward(params, x):
        runs.append(isinstance(x, jax.core.Tracer))
        return x @ params["first"]

    multiply_adds(forward, PARAMS, jnp.ones((2, 8)))
    assert runs == [True]

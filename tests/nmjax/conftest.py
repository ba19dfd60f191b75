"""Fixtures of the optax tests: each transformation, with a number and with a schedule."""

import jax.numpy as jnp
import pytest

from tests.nmjax.optax_cases import PLAN, TRANSFORMATIONS


@pytest.fixture(params=TRANSFORMATIONS)
def row(request):
    return TRANSFORMATIONS[request.param]


@pytest.fixture(params=["number", "schedule"])
def tx(request, row):
    value = row.value
    is_number = request.param == "number"
    return row.make(PLAN, value if is_number else lambda count: value / jnp.float32(1 + count))

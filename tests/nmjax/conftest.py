"""Fixtures of the optax tests: each transformation, with a number and with a schedule."""

import pytest

from tests.nmjax.optax_cases import PLAN, TRANSFORMATIONS


@pytest.fixture(params=TRANSFORMATIONS)
def row(request):
    return TRANSFORMATIONS[request.param]


@pytest.fixture(params=["number", "schedule"])
def tx(request, row):
    value = row.value
    return row.make(PLAN, value if request.param == "number" else lambda count: value / (1 + count))

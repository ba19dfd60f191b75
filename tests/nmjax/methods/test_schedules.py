"""Ramps against the formulas in float64, at their ends to the last bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax

RATE = 0.05
RAMPS = {
    "cubic": (nmjax.cubic_ramp, lambda x, length: x**3),
    "linear": (nmjax.linear_ramp, lambda x, length: x),
    "cosine": (nmjax.cosine_ramp, lambda x, length: 1 - np.cos(np.pi * x / 2)),
    "exponential": (
        lambda begin, end: nmjax.exponential_ramp(begin, end, rate=RATE),
        lambda x, length: (1 - np.exp(-RATE * x * length)) / (1 - np.exp(-RATE * length)),
    ),
}


@pytest.fixture(params=RAMPS)
def ramp_and_formula(request):
    return RAMPS[request.param]


@given(st.data())
def test_equals_the_formula_between_its_ends(data):
    make, formula = RAMPS[data.draw(st.sampled_from(list(RAMPS)))]
    begin = data.draw(st.integers(0, 1000))
    length = data.draw(st.integers(1, 1000))
    step = data.draw(st.integers(0, begin + length + 100))
    x = np.clip((step - begin) / length, 0, 1)
    value = make(begin, begin + length)(step)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, formula(x, length), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (10, 180), (0, 7), (12345, 9876543)])
def test_exactly_0_and_1_outside_and_never_falling(ramp_and_formula, begin, end):
    make, _ = ramp_and_formula
    steps = np.unique([*np.linspace(0, 2 * end, 999).astype(int).tolist(), begin, end, end + 1])
    values = np.asarray(jax.vmap(make(begin, end))(jnp.asarray(steps)))
    assert (values[steps <= begin] == 0).all()
    assert (values[steps >= end] == 1).all()
    assert (np.diff(values) >= 0).all()


def test_traced_steps_do_not_compile_again(ramp_and_formula):
    make, _ = ramp_and_formula
    ramp = make(2, 9)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def at(step):
        return ramp(step)

    values, eager = [at(s) for s in range(12)], [ramp(s) for s in range(12)]
    np.testing.assert_allclose(values, eager, rtol=1e-6)


@pytest.mark.parametrize(("begin", "end"), [(5, 5), (6, 5), (-1, 5), (float("nan"), 5)])
def test_ends_that_are_none(ramp_and_formula, begin, end):
    make, _ = ramp_and_formula
    with pytest.raises(ValueError, match="0 <= begin < end"):
        make(begin, end)


@pytest.mark.parametrize("rate", [0, -0.1, float("nan")])
def test_a_rate_that_is_not_positive(rate):
    with pytest.raises(ValueError, match="rate of an exponential ramp must be positive"):
        nmjax.exponential_ramp(0, 5, rate=rate)

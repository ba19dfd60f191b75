"""Ramps against the formulas in float64, at their ends to the last bit."""

import math
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.methods import schedules
from nmjax.methods.schedules import remaining

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


POWERS = {"linear": 1, "cubic": 3}
SPARSITIES = [Fraction(66, 128), Fraction(197, 256), Fraction(29, 100), Fraction(1, 3)]


def left_exactly(power, begin, end, step, total):
    """How many are left, in exact fractions."""
    x = min(max(Fraction(step - begin) / (end - begin), 0), 1)
    return math.floor(total * (1 - x**power))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "float16"])
@pytest.mark.parametrize("power", POWERS)
def test_what_is_left_is_exact_at_every_epoch(power, dtype):
    """Traced, in 32 bits, and where the ramp is as small as a rounding error (2e-7)."""
    ramp, epochs = RAMPS[power][0](10, 180), range(250)
    for sparsity in SPARSITIES:
        for inputs in (3, 64, 100, 512):
            total = sparsity * inputs
            count = jax.jit(jax.vmap(lambda step, total=total: remaining(ramp, step, total)))
            counts = count(jnp.arange(250).astype(dtype))
            assert counts.dtype == jnp.int32
            exact = [left_exactly(POWERS[power], 10, 180, epoch, total) for epoch in epochs]
            assert counts.tolist() == exact


@given(st.data())
def test_what_is_left_is_exact_at_any_step(data):
    name = data.draw(st.sampled_from(list(POWERS)))
    begin, length = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 10**6))
    total = data.draw(st.sampled_from(SPARSITIES)) * data.draw(st.integers(0, 100))
    steps = data.draw(st.lists(st.integers(0, 2 * 10**6), min_size=1))
    ramp = RAMPS[name][0](begin, begin + length)
    counts = jax.vmap(lambda step: remaining(ramp, step, total))(jnp.array(steps))
    exact = [left_exactly(POWERS[name], begin, begin + length, step, total) for step in steps]
    assert counts.tolist() == exact


@given(st.lists(st.floats(0, 300, width=32), min_size=1), st.sampled_from(list(POWERS)))
def test_what_is_left_is_exact_between_steps(steps, name):
    """A ramp may count epochs, and a step may be a part of one."""
    ramp, total = RAMPS[name][0](10.5, 180), Fraction(33)
    counts = jax.vmap(lambda step: remaining(ramp, step, total))(np.float32(steps))
    # In halves, the begin of the ramp is an integer.
    exact = [left_exactly(POWERS[name], 21, 360, 2 * Fraction(step), total) for step in steps]
    assert counts.tolist() == exact


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("begin", [0, 1000])
def test_what_is_left_of_a_large_layer_takes_few_comparisons(monkeypatch, power, begin):
    """Two or so for each count, not the twenty or thirty of a bisection."""
    looks, left_at = [], schedules._Ramp.left_at
    monkeypatch.setattr(
        schedules._Ramp, "left_at", lambda ramp, step: looks.append(step) or left_at(ramp, step)
    )
    total = Fraction(7168 * 66, 128)
    schedules._last_steps.cache_clear()
    for dtype in (jnp.int32, jnp.float32):
        steps = np.linspace(0, 20_000, 99).astype(dtype)
        counts = [remaining(RAMPS[power][0](begin, 18_001), step, total) for step in steps]
        exact = [
            left_exactly(POWERS[power], begin, 18_001, Fraction(float(s)), total) for s in steps
        ]
        assert counts == exact
    # Two dtypes, and sometimes a place next to the guess.
    assert 0 < len(looks) < 2 * 3 * total


@pytest.mark.parametrize("end", [1e39, 1e300])
@pytest.mark.parametrize("begin", [0, 2e38, 9e38])
@pytest.mark.parametrize("power", POWERS)
def test_a_ramp_may_end_after_the_highest_step_of_the_dtype(power, begin, end):
    ramp, total = RAMPS[power][0](begin, end), Fraction(33)
    steps = [0.0, 1.0, 1e38, float(np.finfo(np.float32).max)]
    counts = [remaining(ramp, np.float32(step), total) for step in steps]
    exact = [
        left_exactly(POWERS[power], int(begin), int(end), Fraction(float(np.float32(step))), total)
        for step in steps
    ]
    assert counts == exact
    assert remaining(ramp, np.int32(2**31 - 1), total) == 33 - (begin == 0)


@pytest.mark.parametrize("name", ["cosine", "exponential"])
def test_what_is_left_of_other_ramps_is_that_of_float64(name):
    make, formula = RAMPS[name]
    ramp, epochs = make(10, 180), np.arange(250)
    x = np.clip((epochs - 10) / 170, 0, 1)
    for total in (Fraction(33), Fraction(1024, 10)):
        counts = jax.vmap(lambda step, total=total: remaining(ramp, step, total))(epochs)
        np.testing.assert_array_equal(counts, np.floor(float(total) * (1 - formula(x, 170))))


def test_a_function_of_ones_own_may_be_off_by_its_rounding():
    """0.6 is above three fifths in float32, but two of five are left."""
    for own in (lambda step: jnp.float32(0.6), lambda step: jnp.float16(0.6)):
        assert remaining(own, 7, Fraction(5)) == 2
    assert remaining(lambda step: jnp.float32(0), 7, Fraction(29, 2)) == 14
    assert remaining(lambda step: jnp.float32(1), 7, Fraction(29, 2)) == 0


@pytest.mark.parametrize(
    ("begin", "end"), [(5, 5), (6, 5), (-1, 5), (float("nan"), 5), (5, float("inf"))]
)
def test_ends_that_are_none(ramp_and_formula, begin, end):
    make, _ = ramp_and_formula
    with pytest.raises(ValueError, match="0 <= begin < end"):
        make(begin, end)


@pytest.mark.parametrize("rate", [0, -0.1, float("nan")])
def test_a_rate_that_is_not_positive(rate):
    with pytest.raises(ValueError, match="rate of an exponential ramp must be positive"):
        nmjax.exponential_ramp(0, 5, rate=rate)

"""A budget of weights, distributed over the layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax

RNG = np.random.RandomState(0)
PARAMS = {
    "large": np.float32(RNG.randn(64, 64)),
    "small": np.float32(RNG.randn(16, 32)),
    "conv": np.float32(RNG.randn(3, 3, 16, 32) * 3),
}
AXES = {"conv": nmjax.Axes((-2,), (-1,), (-4, -3)), ".": -2}


def planned(pattern="2:8", rules=None):
    return nmjax.make_plan(PARAMS, pattern, axes=AXES, rules=rules)


def counts(rules):
    return [8 if pattern is None else pattern.n for pattern in rules.values()]


def kept(rules):
    return sum(
        n / 8 * PARAMS[rule[1:-1]].size for rule, n in zip(rules, counts(rules), strict=True)
    )


TOTAL = sum(w.size for w in PARAMS.values())


@pytest.mark.parametrize("method", ["erk", "greedy"])
def test_rules_keep_no_more_than_the_budget_and_make_a_plan(method):
    for budget in (0.125, 0.2, 0.5, 0.8, 1.0):
        rules = nmjax.allocate(PARAMS, planned(), budget, method)
        assert kept(rules) <= budget * TOTAL * (1 + 1e-9)
        # Not one more step fits, unless everything is kept: rounding wastes less than a step.
        assert kept(rules) == TOTAL if budget == 1.0 else kept(rules) > budget * TOTAL / 3
        if budget < 1.0:
            again = planned(rules=rules)
            assert sum(leaf.kept for leaf in again.values()) <= kept(rules)


def test_erk_gives_small_layers_more():
    rules = nmjax.allocate(PARAMS, planned(), 0.25)
    # Shares: conv (16 + 32 + 6) / 4608 = .0117, large 128 / 4096 = .0313, small 48 / 512 = .094.
    # A quarter of 9216 weights is c (54 + 128 + 48), so c = 10.0: densities .117, .313, .94.
    # Half of the small one would lack most, and there is budget left to keep all of it.
    assert dict(zip(rules, counts(rules), strict=True)) == {"^conv$": 1, "^large$": 2, "^small$": 8}


def test_greedy_loses_the_least_score_of_all_choices_on_its_way():
    plan = planned()

    def score(numbers):
        rules = {f"^{name}$": f"{n}:8" for name, n in zip(PARAMS, numbers, strict=True)}
        pruned = nmjax.prune(PARAMS, planned(rules=rules))
        return sum(float(jnp.abs(w).sum()) for w in pruned.values())

    rules = nmjax.allocate(PARAMS, plan, 0.5, "greedy")
    found = {rule[1:-1]: n for rule, n in zip(rules, counts(rules), strict=True)}
    choices = itertools.product((1, 2, 4, 8), repeat=3)
    limit = kept(rules)
    as_small = [
        numbers
        for numbers in choices
        if sum(n / 8 * w.size for n, w in zip(numbers, PARAMS.values(), strict=True)) <= limit
    ]
    assert score([found[name] for name in PARAMS]) == pytest.approx(max(map(score, as_small)))
    # The large weights are in the convolution, which ERK makes the sparsest.
    assert found["conv"] > found["large"]


def test_impossible_budgets_are_errors():
    for budget in (0, 1.5):
        with pytest.raises(ValueError, match="0 < budget <= 1"):
            nmjax.allocate(PARAMS, planned(), budget)
    with pytest.raises(TypeError, match="budget must be a number, got 'half'"):
        nmjax.allocate(PARAMS, planned(), "half")
    with pytest.raises(ValueError, match=r"1:m in every leaf keeps a fraction of 0.1250"):
        nmjax.allocate(PARAMS, planned(), 0.1)
    with pytest.raises(ValueError, match='method must be "erk" or "greedy"'):
        nmjax.allocate(PARAMS, planned(), 0.5, "uniform")
    with pytest.raises(ValueError, match=r"only N:M patterns .* small \(1x4@0.5\)"):
        nmjax.allocate(PARAMS, planned(rules={"small": "1x4@0.5"}), 0.5)


def test_greedy_needs_finite_values():
    name = next(iter(PARAMS))
    wrong = PARAMS | {name: PARAMS[name] * np.nan}
    with pytest.raises(ValueError, match=f"some of {name}.* are NaN or infinite"):
        nmjax.allocate(wrong, planned(), 0.5, "greedy")
    with pytest.raises(TypeError, match=r"unknown inside jax\.jit.*only shapes"):
        jax.jit(lambda params: nmjax.allocate(params, planned(), 0.5, "greedy"))(PARAMS)

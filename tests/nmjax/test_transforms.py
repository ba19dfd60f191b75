"""What the transformations compute, against the formulas; how they fit optax is tested apart."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax.optax_chains import KEEPING

RNG = np.random.default_rng(0)
RATE, LAMBDA = 0.01, 2e-4


def column(*values):
    return {"kernel": jnp.array(values, jnp.float32)[:, None]}


PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32), "bias": jnp.ones(6)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)},
}
GRADS = jax.tree.map(lambda w: jnp.cos(3 * w), PARAMS)
PLAN = nmjax.make_plan(PARAMS, "2:4")
MASKS = nmjax.compute_masks(PARAMS, PLAN)
OTHER_MASKS = {name: ~mask for name, mask in MASKS.items()}


PROMOTES = pytest.mark.not_under("jax_numpy_dtype_promotion")


def cases(names, *promoting):
    """Names as parameters; some stand for parts of optax that mix floats with integers."""
    return [pytest.param(name, marks=PROMOTES if name in promoting else []) for name in names]


def update(tx, params=PARAMS, grads=GRADS, **extra_args):
    return tx.update(grads, tx.init(params), params, **extra_args)[0]


def expected_update(lambda_w, masks=MASKS):
    pulled = {
        layer: GRADS[layer]["kernel"]
        + jnp.where(masks[f"{layer}/kernel"], 0.0, lambda_w) * PARAMS[layer]["kernel"]
        for layer in "ab"
    }
    bias = GRADS["a"]["bias"]
    return {"a": {"kernel": pulled["a"], "bias": bias}, "b": {"kernel": pulled["b"]}}


def assert_trees_close(a, b, rtol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


# The term


@pytest.mark.parametrize("lambda_w", [0.3, 0.0, -0.3, 1, np.float32(0.5), jnp.float32(0.5)])
def test_adds_the_pull_on_the_pruned_weights(lambda_w):
    assert_trees_close(
        update(nmjax.add_sparse_refined(PLAN, lambda_w)), expected_update(float(lambda_w))
    )


def test_default_strength_is_that_of_the_paper():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    pull = update(nmjax.add_sparse_refined(PLAN), grads=zeros)
    expected = jnp.where(MASKS["a/kernel"], 0.0, 2e-4) * PARAMS["a"]["kernel"]
    np.testing.assert_allclose(pull["a"]["kernel"], expected, rtol=1e-6)


def test_given_masks_win():
    tx = nmjax.add_sparse_refined(PLAN, 0.3)
    assert_trees_close(update(tx, masks=OTHER_MASKS), expected_update(0.3, OTHER_MASKS))
    assert_trees_close(update(tx, masks=None), expected_update(0.3))


def test_the_mask_follows_the_parameters():
    """Not those of init: a weight that grew is no longer pulled."""
    tx = nmjax.add_sparse_refined(PLAN, 0.3)
    state = tx.init(PARAMS)
    changed = jax.tree.map(lambda w: w + 0.5 * jnp.sin(9 * w), PARAMS)
    assert nmjax.total_sad(MASKS, nmjax.compute_masks(changed, PLAN)) > 0
    assert_trees_close(tx.update(GRADS, state, changed)[0], update(tx, changed))


def test_a_pull_is_a_step_towards_zero():
    params = column(4.0, -3.0, 2.0, -1.0)
    tx = optax.chain(nmjax.add_sparse_refined(nmjax.make_plan(params, "2:4"), 0.5), optax.sgd(0.1))
    after = optax.apply_updates(params, update(tx, params, jax.tree.map(jnp.zeros_like, params)))
    np.testing.assert_allclose(after["kernel"].ravel(), [4.0, -3.0, 1.9, -0.95], rtol=1e-6)


@pytest.mark.not_under("jax_debug_nans")
def test_kept_weights_of_any_value_are_not_pulled():
    """Among them zeros and non-finite ones, which are kept where they win their group."""
    params = column(np.nan, np.inf, 2.0, 1.0, 0.0, 0.0, 0.0, -0.0)
    tx = nmjax.add_sparse_refined(nmjax.make_plan(params, "2:4"), 0.5)
    pull = update(tx, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(pull["kernel"].ravel(), [0, 0, 1.0, 0.5, 0, 0, 0, 0])


def test_pruned_infinities_do_not_reach_other_weights():
    params = column(4.0, 3.0, np.inf, 1.0)
    plan = nmjax.make_plan(params, "2:4")
    masks = {"kernel": jnp.array([[True], [True], [False], [False]])}
    grads = jax.tree.map(jnp.zeros_like, params)
    pull = update(nmjax.add_sparse_refined(plan, 0.5), params, grads, masks=masks)
    np.testing.assert_array_equal(pull["kernel"].ravel(), [0, 0, np.inf, 0.5])


def test_boxed_parameters():
    boxed, boxed_grads = (
        jax.tree.map(lambda w: nn.Partitioned(w, (None,) * w.ndim), tree)
        for tree in (PARAMS, GRADS)
    )
    tx = nmjax.add_sparse_refined(PLAN, 0.3)
    updates = update(tx, boxed, boxed_grads)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed)
    assert_trees_close(nn.meta.unbox(updates), expected_update(0.3))
    masked = optax.masked(tx, jax.tree.map(lambda w: w.ndim > 1, boxed))
    assert_trees_close(nn.meta.unbox(update(masked, boxed, boxed_grads)), expected_update(0.3))


# Both orders under Adam


def adam(g, memory, t):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    return memory["m"] / (1 - 0.9**t) / (np.sqrt(memory["v"] / (1 - 0.999**t)) + 1e-8)


@PROMOTES
@pytest.mark.parametrize("order", ["before", "after"])
def test_both_orders_under_adam_are_the_formulas(order):
    """Coupled: Adam(g + pull). Decoupled: Adam(g) + pull."""
    pull = nmjax.add_sparse_refined(PLAN, 0.3)
    inner = (pull, optax.scale_by_adam()) if order == "before" else (optax.scale_by_adam(), pull)
    tx = optax.chain(*inner, optax.scale(-RATE))
    params, state = PARAMS, tx.init(PARAMS)
    w, memory = np.float64(PARAMS["a"]["kernel"]), {}
    for t in range(1, 6):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(3 * p + t), params)
        mask = np.asarray(nmjax.nm_mask(w, 2, 4))
        g, term = np.cos(3 * w + t), 0.3 * ~mask * w
        step = adam(g + term, memory, t) if order == "before" else adam(g, memory, t) + term
        w = w - RATE * step
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["a"]["kernel"], w, rtol=1e-4, atol=1e-6)


@PROMOTES
@pytest.mark.parametrize("lambda_w", [2e-4, 2e-2])
def test_what_the_orders_do_to_small_pruned_weights(lambda_w):
    """Without any other gradient, the coupled step has the learning rate's size whatever lambda
    is; the decoupled one shrinks the weight by the factor 1 - rate * lambda."""
    params = column(1.0, 0.9, 0.1, 0.001)
    pull = nmjax.add_sparse_refined(nmjax.make_plan(params, "2:4"), lambda_w)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(*order):
        return update(optax.chain(*order, optax.scale(-RATE)), params, zeros)["kernel"].ravel()

    coupled = step(pull, optax.scale_by_adam())
    np.testing.assert_allclose(coupled, [0, 0, -RATE, -RATE], rtol=0.06)  # Adam's eps shows
    decoupled = step(optax.scale_by_adam(), pull)
    expected = [0, 0, -RATE * lambda_w * 0.1, -RATE * lambda_w * 0.001]
    np.testing.assert_allclose(decoupled, expected, rtol=1e-5)


# Bad input


def test_parameters_that_do_not_fit_the_plan():
    tx = nmjax.add_sparse_refined(PLAN, 0.3)
    wrong = {"a": {"kernel": jnp.zeros((6, 8)), "bias": jnp.ones(6)}}
    with pytest.raises(ValueError, match="do not fit the plan") as error:
        update(tx, wrong, wrong)
    assert "a/kernel: planned as (8, 6), got (6, 8)" in str(error.value)
    assert "b/kernel: planned as (4, 4), not in the tree" in str(error.value)


def test_masks_that_do_not_fit():
    tx = nmjax.add_sparse_refined(PLAN, 0.3)
    with pytest.raises(ValueError, match=r"a/kernel.*\(6, 8\).*\(8, 6\)"):
        update(tx, masks={**MASKS, "a/kernel": MASKS["a/kernel"].T})
    with pytest.raises(TypeError, match=r"a/kernel.*float32"):
        update(tx, masks={**MASKS, "a/kernel": PARAMS["a"]["kernel"]})
    with pytest.raises(ValueError, match=r"missing: \['b/kernel'\]"):
        update(tx, masks={"a/kernel": MASKS["a/kernel"]})
    with pytest.raises(ValueError, match=r"not planned: \['a/bias'\]"):
        update(tx, masks={**MASKS, "a/bias": jnp.ones(6, bool)})


@pytest.mark.parametrize(
    "lambda_w", [jnp.ones(6), lambda count: jnp.ones(6)], ids=["array", "schedule"]
)
def test_lambda_that_is_no_scalar(lambda_w):
    with pytest.raises(ValueError, match=r"lambda_w must be a scalar, got .*\(6,\)"):
        update(nmjax.add_sparse_refined(PLAN, lambda_w))


def test_errors_come_at_trace_time_too():
    tx = nmjax.add_sparse_refined(PLAN, 0.3)
    with pytest.raises(ValueError, match="b/kernel"):
        jax.jit(tx.update)(GRADS, tx.init(PARAMS), {"a": PARAMS["a"], "b": {"kernel": jnp.ones(3)}})


# The order of a chain

SGD = optax.sgd(RATE)
PULL = nmjax.add_sparse_refined(PLAN, LAMBDA)
FLIP = optax.scale(-1.0)
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, RATE, 2, 9)
WRONG_ORDER = {
    "sgd": optax.chain(SGD, PULL),
    "sgd with momentum": optax.chain(optax.sgd(RATE, 0.9), PULL),
    "schedule": optax.chain(optax.sgd(SCHEDULE), PULL),
    "adamw": optax.chain(optax.clip(1.0), optax.adamw(RATE), PULL),
    "scale": optax.chain(optax.scale_by_adam(), optax.scale(-RATE), PULL),
    "nested": optax.chain(optax.clip(1.0), SGD, optax.chain(PULL, optax.clip(1.0))),
    "masked": optax.chain(SGD, optax.masked(PULL, {"a": True, "b": False})),
    "MultiSteps": optax.MultiSteps(optax.chain(SGD, PULL), 1),
    "parts that keep the sign": optax.chain(
        optax.stateless(lambda u, p: u),
        optax.sgd(RATE),
        PULL,
        optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
        optax.scale(0.5),
        optax.scale_by_learning_rate(SCHEDULE, flip_sign=False),
    ),
}
NEGATE = optax.stateless(lambda updates, params: jax.tree.map(jnp.negative, updates))
# Gradient ascent, written with a part that flips the sign back in a way that cannot be seen.
ASCENT = {
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd)(learning_rate=RATE),
    "masked": optax.masked(SGD, {"a": True, "b": True}),
    "partition": optax.partition({"all": SGD}, {"a": "all", "b": "all"}),
    "MultiSteps": optax.MultiSteps(SGD, 2).gradient_transformation(),
    "muon": optax.contrib.muon(RATE),
    "function": NEGATE,
    "function in a chain": optax.chain(optax.clip(1.0), NEGATE),
    "schedule": optax.scale_by_schedule(lambda count: -RATE),
    "array": optax.scale(jnp.float32(-RATE)),
}
RIGHT_ORDER = {
    "alone": PULL,
    "sgd": optax.chain(PULL, SGD),
    "adam": optax.chain(optax.scale_by_adam(), PULL, optax.scale_by_learning_rate(RATE)),
    "schedule": optax.chain(PULL, optax.sgd(SCHEDULE)),
    "signs that cancel": optax.chain(FLIP, FLIP, PULL),
    "sign flipped back": optax.chain(FLIP, PULL, SGD),
    "flipped back outside": optax.chain(optax.chain(FLIP, PULL), SGD),
    "negative lambda": optax.chain(SGD, nmjax.add_sparse_refined(PLAN, -RATE * LAMBDA)),
    "unknown parts": optax.chain(optax.stateless(lambda u, p: u), PULL),
    "MultiSteps": optax.MultiSteps(optax.chain(PULL, SGD), 2),
    **{f"ascent, {name}": optax.chain(FLIP, PULL, part) for name, part in ASCENT.items()},
}


@pytest.mark.parametrize(
    "name",
    cases(WRONG_ORDER, "schedule", "adamw", "scale", "MultiSteps", "parts that keep the sign"),
)
@pytest.mark.parametrize("jit", [False, True])
def test_the_term_after_the_learning_rate_is_reported(name, jit):
    tx = WRONG_ORDER[name]
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.warns(UserWarning, match=r"after the learning rate.*optax\.chain\(nmjax\.add"):
        update(GRADS, tx.init(PARAMS), PARAMS)


def transformation(name):
    """A transformation of optax with arguments of its own, if it needs some."""
    make = getattr(optax, name)
    needed = {"add_noise": (0.0, 0.5, 0), "scale_by_rprop": (0.1,)}
    try:
        return make(*needed.get(name, ()))
    except TypeError:
        return make(0.5)


MIXING = ("adam", "adamax", "adan", "amsgrad", "belief", "radam", "yogi")
MIXING = ("add_noise", "apply_every", "ema", *(f"scale_by_{name}" for name in MIXING))


@pytest.mark.parametrize("name", cases(KEEPING, *MIXING))
def test_transformations_that_keep_the_sign(name):
    """In the first step, no gradient that is positive everywhere moves a weight up."""
    tx = optax.chain(transformation(name), FLIP)
    params = {"kernel": 1.0 + jnp.arange(6.0).reshape(3, 2)}
    grads = jax.tree.map(lambda w: jnp.ones_like(w) + w, params)
    assert (update(tx, params, grads)["kernel"] <= 0).all() or name == "centralize"
    plan = nmjax.make_plan(PARAMS, "2:4")
    with pytest.warns(UserWarning, match="after the learning rate"):
        update(optax.chain(SGD, nmjax.add_sparse_refined(plan), transformation(name)))


@pytest.mark.parametrize(
    "name",
    cases(RIGHT_ORDER, "adam", "schedule", "MultiSteps", "ascent, MultiSteps", "ascent, muon"),
)
def test_there_is_no_false_alarm(name):
    tx = RIGHT_ORDER[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


# Bad input


@pytest.mark.parametrize("wrong", ["0.1", None, [0.1], True, 1j])
def test_lambda_is_a_number_from_the_start(wrong):
    with pytest.raises(TypeError, match=r"lambda_w must be a number .* such as 2e-4; got"):
        nmjax.add_sparse_refined(PLAN, wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), np.float32("nan"), np.ones(2)])
def test_lambda_is_a_finite_scalar_from_the_start(wrong):
    with pytest.raises(ValueError, match=r"lambda_w must be (finite|a scalar)"):
        nmjax.add_sparse_refined(PLAN, wrong)


def test_updates_have_the_tree_of_the_parameters():
    state = PULL.init(PARAMS)
    with pytest.raises(ValueError, match="no leaf named a/kernel, b/kernel"):
        PULL.update({"params": GRADS}, state, PARAMS)
    with pytest.raises(TypeError, match="a/kernel is of type str"):
        PULL.update({**GRADS, "a": {"kernel": "text", "bias": None}}, state, PARAMS)
    updates, _ = PULL.update({**GRADS, "a": None}, state, PARAMS)
    assert updates["a"] is None

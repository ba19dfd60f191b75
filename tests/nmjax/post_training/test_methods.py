"""Pruning with statistics: formulas, order of the errors, and every kind of leaf."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nmjax
from nmjax import post_training
from nmjax.post_training import Statistics, collect, improve_by_swaps, least_squares
from tests.nmjax.post_training import layers

GRAM = ("sparse_gpt", "admm", "alps")
METHODS = ("magnitude", "wanda", "ria", *GRAM)


def quick(names, *chosen):
    """Parameters of which only the chosen ones are not slow."""
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in names]


def gram_of(x):
    gram = x.T @ x / len(x)
    return gram, Statistics(
        {"w": jnp.array(gram, jnp.float32)[None]}, {"w": jnp.full(1, float(len(x)))}
    )


def planned(w, pattern, dtype=jnp.float32):
    params = {"w": jnp.array(w, dtype)}
    return params, nmjax.make_plan(params, pattern, axes={"w": -2})


def pruned_by(name, w, statistics, pattern, **settings):
    params, plan = planned(w, pattern)
    return getattr(post_training, name)(params, plan, statistics, **settings)["w"]


@pytest.mark.parametrize(("n", "m"), [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["wanda", "sparse_gpt", "admm"])
def test_methods_equal_their_formulas_in_numpy(name, n, m):
    x, _, w = layers.layer(136, 24, rows=600)  # Larger than one block of SparseGPT.
    gram, statistics = gram_of(x)
    expected = getattr(layers, name)(w, gram, n, m)
    found = pruned_by(name, w, statistics, f"{n}:{m}")
    assert ((found != 0) == (expected != 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_ria_adds_the_shares_of_input_and_output():
    w = jnp.array([[1.0, 9.0], [2.0, 1.0]])  # Shares: of columns 1/3, .9, 2/3, .1; of rows .1 ...
    statistics = Statistics({"w": jnp.array([[16.0, 1.0]])}, {"w": jnp.ones(1)})
    assert pruned_by("ria", w, statistics, "1:2").tolist() == [[0, 9], [2, 0]]
    # With sqrt(s) the first input counts fourfold: (.33 + .1) 4 > (.67 + .67).
    assert pruned_by("ria", w, statistics, "1:2", power=1.0).tolist() == [[1, 9], [0, 0]]


@pytest.fixture(scope="module")
def wide():
    """A layer of 256 x 128 and what every method makes of it at 2:4."""
    x, fresh, w = layers.layer(256, 128)
    _, statistics = gram_of(x)
    params, plan = planned(w, "2:4")
    found = {name: getattr(post_training, name)(params, plan, statistics) for name in METHODS}
    return x, fresh, w, params, plan, statistics, found


def test_the_errors_come_in_the_published_order(wide):
    x, fresh, w, _, plan, _, found = wide
    for data in (x, fresh):
        errors = [layers.error(data, w, found[name]["w"]) for name in METHODS if name != "ria"]
        assert errors == sorted(errors, reverse=True)
        # Each step of the ladder is one that a user would notice.
        assert all(after < 0.9 * before for before, after in itertools.pairwise(errors))
    for params in found.values():
        nmjax.check_sparse(params, plan)


def test_least_squares_is_the_best_on_its_mask(wide):
    x, fresh, w, params, plan, statistics, found = wide
    for name in ("magnitude", "wanda", "sparse_gpt"):
        masks = {"w": found[name]["w"] != 0}
        fitted = least_squares(params, plan, statistics, masks)["w"]
        assert (masks["w"] | (fitted == 0)).all()
        for data in (x, fresh):
            assert layers.error(data, w, fitted) < 0.9 * layers.error(data, w, found[name]["w"])
    expected = layers.least_squares(w[:, :4], gram_of(x)[0], np.array(masks["w"])[:, :4])
    np.testing.assert_allclose(fitted[:, :4], expected, atol=1e-4)


def test_least_squares_changes_nothing_where_everything_is_kept():
    x, _, w = layers.layer(16, 4, rows=8)  # A singular Gram.
    params, plan = planned(w, "4:4")
    fitted = least_squares(params, plan, gram_of(x)[1], {"w": jnp.ones(w.shape, bool)})["w"]
    np.testing.assert_allclose(fitted, w, atol=1e-4)


@pytest.mark.parametrize("name", quick(METHODS, "alps"))
def test_weights_with_the_pattern_stay(name):
    x, _, w = layers.layer(16, 6, rows=300)
    sparse = np.where(layers.in_groups(abs(w), 2, 4), w, 0)
    np.testing.assert_allclose(pruned_by(name, sparse, gram_of(x)[1], "2:4"), sparse, atol=1e-5)


def test_no_swap_is_left_that_lowers_the_error():
    x, _, w = layers.layer(16, 6, rows=300)
    gram, statistics = gram_of(x)
    params, plan = planned(w, "2:4")
    before = {"w": post_training.wanda(params, plan, statistics)["w"] != 0}
    mask = np.array(improve_by_swaps(params, plan, statistics, before)["w"])

    def errors(mask):
        d = np.where(mask, 0, w)
        return np.einsum("io,ij,jo->o", d, gram, d)

    assert (mask.reshape(-1, 4, 6).sum(1) == 2).all()
    assert (errors(mask) <= errors(before["w"]) * (1 + 1e-6)).all()
    assert (errors(mask) < errors(before["w"])).any()
    for group, (i, j) in itertools.product(range(4), itertools.combinations(range(4), 2)):
        swapped = mask.copy()
        rows = [4 * group + i, 4 * group + j]
        swapped[rows] = swapped[rows[::-1]]
        assert (errors(swapped) >= errors(mask) * (1 - 1e-5)).all()
    # One step carries out the best swap of each output.
    one = np.array(improve_by_swaps(params, plan, statistics, before, steps=1)["w"])
    assert set((one != before["w"]).sum(0).tolist()) <= {0, 2}


@pytest.mark.parametrize("name", quick(GRAM, "sparse_gpt"))
def test_swapped_inputs_give_swapped_weights_where_groups_are_strided(name):
    x, _, w = layers.layer(16, 6, rows=300)
    order = np.arange(16).reshape(2, 4, 2).swapaxes(1, 2).ravel()  # Groups first, then strides.
    expected = pruned_by(name, w[order], gram_of(x[:, order])[1], "2:4")
    found = pruned_by(name, w, gram_of(x)[1], "2:4/2")
    np.testing.assert_allclose(found[order], expected, atol=1e-4)


@pytest.mark.parametrize("name", quick(METHODS, "sparse_gpt", "ria"))
def test_dead_inputs_singular_grams_and_bfloat16_are_no_trouble(name):
    x, _, w = layers.layer(32, 8, rows=5)
    x[:, :3] = 0
    params, plan = planned(w, "2:4", jnp.bfloat16)
    found = getattr(post_training, name)(params, plan, gram_of(x)[1])["w"]
    assert found.dtype == jnp.bfloat16
    assert np.isfinite(np.float32(found)).all()
    nmjax.check_sparse({"w": found}, plan)
    assert layers.error(x, np.float64(params["w"]), np.float64(found)) < 0.5


@pytest.mark.parametrize("name", quick(METHODS, "alps", "wanda"))
def test_without_any_input_the_magnitudes_decide(name):
    w = np.random.default_rng(0).normal(size=(16, 4))
    params, plan = planned(w, "2:4")
    found = getattr(post_training, name)(params, plan, gram_of(np.zeros((9, 16)))[1])["w"]
    if name == "ria":  # Its shares count, and the activations do not.
        ones = gram_of(np.ones((9, 16)))[1]
        expected = post_training.ria(params, plan, ones, power=0.0)["w"]
    else:
        expected = nmjax.prune(params, plan)["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def network(params, image):
    def conv(x, w, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    x = jax.nn.relu(conv(image, params["conv"]))
    x = jax.nn.relu(conv(x, params["grouped"], 2)) + conv(x, params["whole"])
    x, _ = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["stack"])
    return jnp.einsum("nhwc,cde->nhwde", x, params["blocks"]) @ params["strided"]


@pytest.fixture(scope="module")
def every_kind():
    """A network with every kind of leaf, its plan, data, and Gram matrices."""
    shapes = {
        "conv": (3, 3, 4, 8),
        "grouped": (3, 1, 4, 8),
        "whole": (1, 3, 8, 8),
        "stack": (2, 8, 8),
        "blocks": (8, 2, 8),
        "strided": (8, 4),
    }
    rng = np.random.RandomState(0)
    params = {
        name: jnp.array(rng.randn(*shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
        for name, shape in shapes.items()
    }
    x = jnp.array(rng.randn(4, 6, 6, 4), jnp.float32)
    rules = {"blocks": "1x4@0.5", "whole": "2:4/kernel", "strided": "2:4/2", "grouped": "1x2@0.5"}
    plan = nmjax.make_plan(params, "2:4", rules=rules, forward=network, inputs=(x,))
    return params, plan, x, collect(network, params, [x], plan, "gram")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_leaf_gets_its_pattern_and_a_small_error(every_kind, name):
    params, plan, x, statistics = every_kind
    found = jax.jit(getattr(post_training, name), static_argnums=1)(params, plan, statistics)
    nmjax.check_sparse(found, plan)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    density = nmjax.density(jax.tree.map(lambda w: w != 0, found))
    assert density == pytest.approx(dict.fromkeys(plan, 0.5))
    if name == "sparse_gpt":
        by_size = nmjax.prune(params, plan)
        outputs = [network(p, x) for p in (params, found, by_size)]
        errors = [jnp.sum((y - outputs[0]) ** 2) for y in outputs[1:]]
        assert errors[0] < 0.8 * errors[1]
        fitted = least_squares(params, plan, statistics, nmjax.compute_masks(params, plan))
        assert jnp.sum((network(fitted, x) - outputs[0]) ** 2) < 0.8 * errors[1]


def test_statistics_that_do_not_fit_are_an_error():
    x, _, w = layers.layer(16, 4, rows=100)
    gram, statistics = gram_of(x)
    squares = Statistics({"w": jnp.array(np.diag(gram))[None]}, statistics.rows)
    with pytest.raises(ValueError, match=r'needs Gram matrices: collect\(..., kind="gram"\)'):
        pruned_by("sparse_gpt", w, squares, "2:4")
    with pytest.raises(ValueError, match="no statistics of w; collect them with the same plan"):
        pruned_by("wanda", w, Statistics({}, {}), "2:4")
    with pytest.raises(ValueError, match=r"w \(8, 4\) have the shape \(1, 16\) in place of \(1, 8"):
        pruned_by("wanda", w[:8], statistics, "2:4")
    with pytest.raises(TypeError, match=r"must come from nmjax\.post_training\.collect, got dict"):
        pruned_by("wanda", w, {"w": gram}, "2:4")
    with pytest.raises(TypeError, match="ridge must be a number"):
        pruned_by("alps", w, statistics, "2:4", ridge="x")
    with pytest.raises(TypeError, match="method must be a name or a function, got int"):
        post_training.prune_with(None, {}, None, [], 5)
    with pytest.raises(ValueError, match="pruning_steps lie between 1 and steps=3, got 4"):
        pruned_by("admm", w, statistics, "2:4", steps=3, pruning_steps=4)
    for name, rho in (("alps", 0), ("admm", -1.0), ("alps", float("nan"))):
        with pytest.raises(ValueError, match="rho must be finite and above 0, got"):
            pruned_by(name, w, statistics, "2:4", rho=rho)
    params, plan = planned(w, "1:4")
    with pytest.raises(ValueError, match=r"keep more than the plan.*\n  w \(16, 4\): .* than 1:4"):
        least_squares(params, plan, statistics, {"w": jnp.ones(w.shape, bool)})
    params, plan = planned(w, "1x2@0.5")
    with pytest.raises(ValueError, match=r"swaps need groups, .* w \(1x2@0.5\)"):
        improve_by_swaps(params, plan, statistics, nmjax.compute_masks(params, plan))


@pytest.mark.not_under("jax_debug_nans")
def test_a_gram_matrix_that_cannot_be_solved_is_an_error():
    x, _, w = layers.layer(16, 4, rows=4)
    few = gram_of(x)[1]  # Of rank 4.
    with pytest.raises(ValueError, match=r"not finite:\n  w \(16, 4\)\n.* larger ridge="):
        pruned_by("sparse_gpt", w, few, "2:4", ridge=-0.01)

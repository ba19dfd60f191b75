"""Masks sparse along two axes, against brute force over all masks of a tile."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

import nmjax
from nmjax.masks.transposable import _patterns, transposable_mask


def best_sum(tile, n):
    """The most that a mask with n ones in each row and column can keep, by trying all masks."""
    m = len(tile)
    best = -np.inf
    for rows in itertools.product(itertools.combinations(range(m), n), repeat=m):
        counts = np.bincount(np.concatenate(rows), minlength=m)
        if (counts == n).all():
            best = max(best, sum(tile[i, list(row)].sum() for i, row in enumerate(rows)))
    return best


best_mask = jax.jit(transposable_mask, static_argnums=(1, 2))


@given(
    st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (2, 3), (4, 4)]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 2**32 - 1),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_every_tile_is_optimal(pattern, high, wide, seed, dtype):
    n, m = pattern
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(high * m, wide * m)), dtype)
    mask = np.asarray(best_mask(w, n, m))
    for i, j in itertools.product(range(high), range(wide)):
        tile = np.s_[i * m : (i + 1) * m, j * m : (j + 1) * m]
        assert (mask[tile].sum(axis=0) == n).all()
        assert (mask[tile].sum(axis=1) == n).all()
        scores = np.abs(np.asarray(w[tile], np.float64))
        np.testing.assert_allclose(scores[mask[tile]].sum(), best_sum(scores, n), rtol=1e-6)


@pytest.mark.parametrize(("n", "m", "count"), [(2, 4, 90), (1, 4, 24), (3, 4, 24), (1, 3, 6)])
def test_number_of_patterns(n, m, count):
    assert _patterns(n, m).shape == (count, m * m)


def optimum(tile, n):
    """The exact optimum: the vertices of this linear program are 0 and 1."""
    m = len(tile)
    rows, columns = np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))
    program = linprog(
        -tile.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.full(2 * m, n), bounds=(0, 1)
    )
    return -program.fun


@pytest.mark.parametrize(
    ("n", "m", "tiles", "percent"),
    [
        (4, 8, 4, 0.5),
        pytest.param(4, 8, 64, 0.02, marks=pytest.mark.slow),
        pytest.param(8, 16, 64, 0.1, marks=pytest.mark.slow),
        pytest.param(2, 8, 64, 0.2, marks=pytest.mark.slow),
    ],
)
def test_large_tiles_are_close_to_the_optimum(n, m, tiles, percent):
    w = np.random.default_rng(5).normal(size=(m, tiles * m)).astype(np.float32)
    mask = np.asarray(transposable_mask(w, n, m))
    assert (mask.sum(axis=0) <= n).all()
    assert (mask.reshape(m, tiles, m).sum(axis=2) <= n).all()
    scores = np.abs(w.astype(float))
    best = sum(optimum(scores[:, i * m : (i + 1) * m], n) for i in range(tiles))
    assert best * (1 - percent / 100) <= (scores * mask).sum() <= best * (1 + 1e-6)


@pytest.mark.not_under("jax_debug_nans")
def test_large_tiles_of_any_size_and_sign():
    """Scores that are tiny, all equal, negative or not finite."""
    w = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    w[:, :8] *= 1e-30
    w[:, 8:16] = 1
    w[0, 16], w[1, 17] = np.nan, np.inf
    mask = np.asarray(transposable_mask(w, 4, 8))
    assert mask[0, 16]
    assert mask[1, 17]
    assert (mask.reshape(8, 4, 8).sum(axis=2) == 4).all()
    assert (mask.sum(axis=0) == 4).all()
    dropped = np.asarray(transposable_mask(w[:, 24:], 4, 8, score=lambda w: -jnp.abs(w)))
    size = np.abs(w[:, 24:])
    assert size[dropped].sum() < size[mask[:, 24:]].sum()
    assert (dropped.sum(axis=0) == 4).all()


def test_axes_and_stacks():
    w = jax.random.normal(jax.random.key(0), (4, 3, 8))
    mask = transposable_mask(w, axes=(-1, 0))
    for layer in range(3):
        np.testing.assert_array_equal(mask[:, layer], transposable_mask(w[:, layer].T).T)
    np.testing.assert_array_equal(
        jax.vmap(transposable_mask)(w.swapaxes(0, 1)), mask.swapaxes(0, 1)
    )


def test_both_products_are_sparse():
    w = jax.random.normal(jax.random.key(0), (16, 8))
    pruned = jnp.where(transposable_mask(w), w, 0)
    for side in (pruned, pruned.T):
        params = {"kernel": side}
        nmjax.check_sparse(params, nmjax.make_plan(params, "2:4"))


@pytest.mark.not_under("jax_debug_nans")
def test_scores_and_numbers_that_are_none():
    w = jnp.zeros((4, 4)).at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2, 2].set(-jnp.inf)
    mask = transposable_mask(w, 1, 4)
    assert mask[0, 0]
    assert mask[1, 1]
    assert mask[2, 2]
    opposite = transposable_mask(w.at[0, 0].set(0), score=lambda w: -jnp.abs(w))
    assert not opposite[1, 1]
    assert jax.grad(lambda w: (w * transposable_mask(w)).sum())(jnp.ones((4, 4))).sum() == 8


@pytest.mark.optimized
def test_shards_of_whole_tiles_need_no_communication():
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.P("a", "b"))
    w = jax.random.normal(jax.random.key(0), (16, 8))
    text = jax.jit(transposable_mask).lower(jax.device_put(w, sharding)).compile().as_text()
    assert not any(f"{op}(" in text for op in ("all-gather", "all-reduce", "all-to-all"))
    mask = jax.jit(transposable_mask)(jax.device_put(w, sharding))
    np.testing.assert_array_equal(mask, transposable_mask(w))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"m": 8}, ValueError, r"tiles of 8 x 8 do not fit weights of shape \(8, 4\)"),
        ({"n": 5}, ValueError, "5"),
        ({"axes": (0, 0)}, ValueError, "same axis"),
        ({"axes": (0, 5)}, ValueError, "two axes"),
        ({"m": 3}, ValueError, r"do not fit weights of shape \(8, 4\)"),
        ({"score": lambda w: w > 0}, TypeError, "scores"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        transposable_mask(jnp.ones((8, 4)), **arguments)


def test_weights_must_be_real_floating():
    with pytest.raises(TypeError, match="weights"):
        transposable_mask(jnp.ones((4, 4), jnp.int32))

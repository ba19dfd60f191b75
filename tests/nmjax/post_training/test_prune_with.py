"""The driver: layer after layer, or in one pass; with interruptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nmjax
from nmjax.post_training import collect, prune_with, sparse_gpt
from tests.nmjax.post_training import layers

RNG = np.random.RandomState(0)
PARAMS = {
    "first": np.float32(RNG.randn(16, 8)),
    "stack": {"up": np.float32(RNG.randn(3, 8, 16)), "down": np.float32(RNG.randn(3, 16, 8) / 4)},
    "last": np.float32(RNG.randn(8, 4)),
}
BATCHES = [np.float32(layers.layer(16, 1, rows=100, seed=seed)[0]) for seed in range(2)]


def layer(h, w):
    return h + jnp.tanh(h @ w["up"]) @ w["down"]


def scanned(params, x):
    h = jnp.tanh(x @ params["first"])
    h, _ = lax.scan(lambda h, w: (layer(h, w), None), h, params["stack"])
    return h @ params["last"]


def pruned_by_hand(data, share=0.0):
    """Layer after layer in NumPy, with the formula of SparseGPT."""

    def prune(w, x, before):
        """The weights for inputs x, which were others before pruning."""
        w, gram = np.float64(w), x.T @ x / len(x)
        ridge = 0.01 * np.diagonal(gram).mean() * np.eye(len(gram))
        # Least squares with a pull to the weights, to the outputs before pruning.
        right = x.T @ before @ w / len(x) + ridge @ w
        aim = np.linalg.solve(gram + ridge, right)
        return layers.sparse_gpt((1 - share) * w + share * aim, gram, 2, 4)

    done = {"first": prune(PARAMS["first"], data, data), "stack": {"up": [], "down": []}}
    h, before = np.tanh(data @ done["first"]), np.tanh(data @ PARAMS["first"])
    for up, down in zip(*PARAMS["stack"].values(), strict=True):
        done["stack"]["up"].append(prune(up, h, before))
        inner, inner_before = np.tanh(h @ done["stack"]["up"][-1]), np.tanh(before @ up)
        done["stack"]["down"].append(prune(down, inner, inner_before))
        h, before = h + inner @ done["stack"]["down"][-1], before + inner_before @ down
    done["last"] = prune(PARAMS["last"], h, before)
    return jax.tree.map(np.array, done, is_leaf=lambda node: isinstance(node, list))


@pytest.fixture(scope="module")
def plan():
    return nmjax.make_plan(PARAMS, "2:4", forward=scanned, inputs=(BATCHES[0],))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_each_layer_sees_the_pruned_ones_before_it_and_runs_resume(plan, share):
    kept = []

    def stop(params, finished):
        kept[:] = [params, finished]
        if "stack/up[1]" in finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_with(scanned, PARAMS, plan, iter(BATCHES), on_finished=stop, compensation=share)
    params, finished = kept
    assert finished == {"first", "stack/up[0]", "stack/down[0]", "stack/up[1]"}
    np.testing.assert_array_equal(params["stack"]["down"][1:], PARAMS["stack"]["down"][1:])
    steps = []
    found = prune_with(
        scanned,
        params,
        plan,
        BATCHES,
        compensation=share,
        dense=PARAMS,
        finished=finished,
        on_finished=lambda _, finished: steps.append(len(finished)),
    )
    assert steps == [5, 6, 7, 8]
    expected = pruned_by_hand(np.float64(np.concatenate(BATCHES)), share)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, expected)
    nmjax.check_sparse(found, plan)


@pytest.mark.slow
def test_one_pass_uses_the_statistics_of_the_dense_network(plan):
    found = prune_with(scanned, PARAMS, plan, BATCHES, sparse_gpt, sequential=False)
    expected = sparse_gpt(PARAMS, plan, collect(scanned, PARAMS, BATCHES, plan, "gram"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_wrong_calls_of_the_driver_are_errors(plan):
    with pytest.raises(ValueError, match="unknown method 'obs'; choose from magnitude, wanda"):
        prune_with(scanned, PARAMS, plan, BATCHES, "obs")
    with pytest.raises(ValueError, match="there are no batches"):
        prune_with(scanned, PARAMS, plan, [])
    with pytest.raises(ValueError, match=r"finished= names stack/up\[3\], which"):
        prune_with(scanned, PARAMS, plan, BATCHES, finished=["first", "stack/up[3]"])
    with pytest.raises(ValueError, match="compensation must be between 0 and 1, got 2"):
        prune_with(scanned, PARAMS, plan, BATCHES, compensation=2)
    with pytest.raises(ValueError, match="compensation= needs sequential=True"):
        prune_with(scanned, PARAMS, plan, BATCHES, sequential=False, compensation=0.5)
    with pytest.raises(ValueError, match="need sequential=True"):
        prune_with(scanned, PARAMS, plan, BATCHES, sequential=False, finished=["first"])
    with pytest.raises(ValueError, match="  last: in no product with an activation"):
        prune_with(lambda p, x: scanned({**p, "last": jnp.eye(8)}, x), PARAMS, plan, BATCHES)

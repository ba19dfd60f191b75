"""The large model's training step, at a size that compiles in a moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import nmjax
from experiments.benchmarks.large_model import Decoder, compare, loss, plan_block

pytestmark = pytest.mark.optimized

TINY = Decoder(layers=2, width=64, hidden=96, heads=4, vocabulary=128)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)


def test_sparse_training_adds_no_collective_and_little_memory(mesh):
    found = compare(TINY, mesh, "2:4", sequences=8, length=64)
    assert found["sparse"]["collectives"] == found["dense"]["collectives"]
    assert sum(found["dense"]["collectives"].values()) > 5
    assert found["sparse"]["argument_bytes"] == found["dense"]["argument_bytes"]
    assert found["ratio"] <= 1.02


@pytest.mark.slow
def test_the_sparse_loss_is_that_of_pruned_weights(mesh):
    shapes = TINY.shapes(mesh)
    keys = iter(jax.random.split(jax.random.key(0), 20))
    params = jax.tree.map(lambda leaf: 0.2 * jax.random.normal(next(keys), leaf.shape), shapes)
    tokens = jax.random.randint(next(keys), (4, 17), 0, TINY.vocabulary)
    plan = plan_block(TINY, mesh, "2:4", sequences=4, length=16)
    assert set(plan) == {f"{name}/kernel" for name in TINY.kernels()}
    with jax.set_mesh(mesh):
        dense, sparse = (
            jax.jit(loss, static_argnums=(0, 1))(TINY, p, params, tokens) for p in (None, plan)
        )
        pruned = {**params, "blocks": nmjax.prune(params["blocks"], plan)}
        expected = jax.jit(loss, static_argnums=(0, 1))(TINY, None, pruned, tokens)
    np.testing.assert_array_equal(sparse, expected)
    assert abs(float(dense - sparse)) > 1e-3
    assert jnp.isfinite(dense)


def test_parameters_are_those_of_seven_billion(mesh):
    leaves = jax.tree.leaves(Decoder().shapes(mesh))
    assert sum(leaf.size for leaf in leaves) == 6_738_415_616


def test_shards_that_cut_groups_are_refused(mesh):
    with pytest.raises(ValueError, match=r"down/kernel .* cuts groups of 4"):
        compare(Decoder(2, 64, 12, 4, 128), mesh, "2:4", sequences=8, length=64)

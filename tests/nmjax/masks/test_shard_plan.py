"""Plans that know how weights lie on automatic mesh axes: the same numbers, and kernels on TPUs."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax

SPECS = {"in": P(None, "data", "model"), "out": P(None, "model", "data")}


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)


def stacked(mesh):
    """Two layers, (layers, inputs, outputs), and the plan of one of them."""
    rng = np.random.default_rng(0)
    params = {
        name: jax.device_put(
            jnp.asarray(rng.normal(size=(2, 32, 32)), "float32"), NamedSharding(mesh, spec)
        )
        for name, spec in SPECS.items()
    }
    return params, nmjax.make_plan(jax.tree.map(lambda w: w[0], params), "2:4", axes={".": (-2,)})


def step(plan):
    """The updates of SR-STE: masks in a scan over layers, then of the stacks in the optimizer."""
    tx = nmjax.add_sparse_refined(plan, 0.1)

    def loss(params):
        def layer(x, weights):
            weights = nmjax.sparsify(weights, plan)
            return jnp.tanh(x @ weights["in"]) @ weights["out"], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), jnp.ones((4, 32)), params)[0] ** 2)

    def updates(params):
        return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

    return updates


def lowered_for(platform, f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_programs_for_tpus_have_the_kernel_and_others_are_the_same(mesh):
    params, plan = stacked(mesh)
    told = nmjax.shard_plan(params, plan)
    assert "nm_prune_4" not in lowered_for("tpu", step(plan), params)
    assert lowered_for("tpu", step(told), params).count("nm_prune_4") >= 6
    with jax.set_mesh(mesh):
        assert "nm_prune_4" in lowered_for("tpu", step(told), params)
    masks = lowered_for("tpu", lambda params: nmjax.compute_masks(params, told), params)
    assert "nm_mask_4" in masks
    over_layers = jax.vmap(lambda params: nmjax.prune(params, told))
    assert "nm_prune_4" in lowered_for("tpu", over_layers, params)
    assert lowered_for("cpu", step(told), params) == lowered_for("cpu", step(plan), params)


def test_updates_are_those_without_shardings(mesh):
    params, plan = stacked(mesh)
    told = nmjax.shard_plan(params, plan)
    wanted, got = jax.jit(step(plan))(params), jax.jit(step(told))(params)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    single = jax.device_put(params, jax.devices()[0])
    pruned, pull = jax.vjp(lambda params: nmjax.prune(params, told), single)
    jax.tree.map(np.testing.assert_array_equal, pruned, nmjax.prune(single, plan))
    ones = jax.tree.map(jnp.ones_like, single)
    masks = nmjax.compute_masks(single, plan)
    jax.tree.map(np.testing.assert_array_equal, pull(ones)[0], masks)


def test_programs_that_prune_on_shards_can_be_traced(mesh):
    params, plan = stacked(mesh)
    single = jax.tree.map(lambda w: w[0], params)
    told = nmjax.shard_plan(params, plan)

    def forward(params, x):
        params = nmjax.prune(params, told)
        return x @ params["in"] @ params["out"]

    assert nmjax.make_plan(single, "2:4", forward=forward, inputs=((4, 32),)) == plan
    # Groups run along the inputs of "out", so the channels before it cannot move.
    assert nmjax.find_channels(forward, single, jnp.ones((4, 32))) == []


def test_where_shardings_do_not_help_the_program_is_that_without_them(mesh):
    params, plan = stacked(mesh)
    told = nmjax.shard_plan(params, plan)
    other = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    with jax.set_mesh(other):
        shapes = {
            name: jax.ShapeDtypeStruct((2, 32, 32), "float32", sharding=NamedSharding(other, spec))
            for name, spec in SPECS.items()
        }
        assert "nm_prune_4" not in lowered_for("tpu", step(told), shapes)
    for spec in (P(None, P.UNCONSTRAINED, "model"),):
        assert nmjax.shard_plan(params, plan, spec, mesh=mesh) == plan
    explicit = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    assert nmjax.shard_plan(params, plan, P(None, "data"), mesh=explicit) == plan
    assert nmjax.shard_plan(jax.device_put(params, jax.devices()[0]), plan) == plan
    by_square = nmjax.make_plan(params, "2:4", axes={".": (-2,)}, score=jnp.square)
    squares = nmjax.shard_plan(params, by_square)
    assert "custom_call" not in lowered_for("tpu", lambda w: nmjax.prune(w, squares), params)


def test_shards_that_cut_groups_are_refused(mesh):
    params = {"kernel": jnp.zeros((8, 8))}
    plan = nmjax.make_plan(params, "2:4")
    with pytest.raises(ValueError, match="cuts groups of 4"):
        nmjax.shard_plan(params, plan, P("data"), mesh=mesh)


# Compiles for TPUs that are not there, in its own process: flags must be set before JAX starts.
COMPILED = """
from experiments.benchmarks.aot.compilers import set_up, tpu_mesh
set_up()
import jax, re
from jax.sharding import NamedSharding, PartitionSpec as P
import nmjax

# Shards of 512 x 1376 lie by columns, those of 1376 x 512 by rows.
mesh = tpu_mesh("v5e", data=2, model=2)
params = {
    "up": jax.ShapeDtypeStruct(
        (1024, 2752), "float32", sharding=NamedSharding(mesh, P("data", "model"))
    ),
    "down": jax.ShapeDtypeStruct(
        (2752, 1024), "float32", sharding=NamedSharding(mesh, P("model", "data"))
    ),
}
for pattern in ("2:4", "1:4", "4:8"):
    plan = nmjax.make_plan(params, pattern, axes={".": (-2,)})
    plan = nmjax.shard_plan(params, plan)
    compiled = jax.jit(lambda params: nmjax.prune(params, plan)).lower(params).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 2, text
    assert not re.findall("all-|collective-|reduce-scatter| copy[(]", text)
    assert compiled.memory_analysis().temp_size_in_bytes == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_compiled_for_tpus_nothing_is_moved():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_packed_weights_do_not_remember_the_mesh(mesh):
    params, plan = stacked(mesh)
    pruned = nmjax.prune(params, plan)
    packed = nmjax.pack(pruned, nmjax.shard_plan(params, plan))
    assert jax.tree.structure(packed) == jax.tree.structure(nmjax.pack(pruned, plan))

"""What XLA makes of a mask: no communication, no large temporaries, no repetition."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.masks.nm import nm_mask

COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
FORMULATIONS = [(2, 4), (3, 8), (5, 40)]
MIB = 2**20


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((4, 2), ("data", "model"), (request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def weights(shape, dtype="float32"):
    values = np.random.default_rng(0).integers(-3, 4, shape)
    return jnp.asarray(values, dtype)


def compiled_mask(w, n, m, axis):
    return jax.jit(lambda w: nm_mask(w, n, m, axis)).lower(w).compile()


@pytest.mark.optimized
@pytest.mark.parametrize(("n", "m"), FORMULATIONS)
@pytest.mark.parametrize(
    ("spec", "axis"),
    [
        (P("data", "model"), -2),
        (P("data", "model"), -1),
        (P(None, "data"), -2),
        (P(None, "data"), -1),
        (P(("data", "model"), None), -2),
        (P(None, ("data", "model")), -1),
    ],
)
def test_aligned_shards_need_no_communication(mesh, n, m, spec, axis):
    w = weights((8 * m, 8 * m))
    sharded = jax.device_put(w, NamedSharding(mesh, spec))
    compiled = compiled_mask(sharded, n, m, axis)
    mask = compiled(sharded)
    assert not COLLECTIVES.findall(compiled.as_text())
    assert mask.sharding.is_equivalent_to(sharded.sharding, mask.ndim)
    np.testing.assert_array_equal(mask, nm_mask(np.asarray(w), n, m, axis))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [
        # Attention out kernel, heads sharded or not; a group lies in one head, or in several.
        ((8, 16, 6), P("data", None, "model"), (-3, -2)),
        ((8, 16, 6), P(None, "data", "model"), (-3, -2)),
        ((8, 6, 16), P("model", None, "data"), (-3, -2)),
        # Convolution kernel HWIO in the order (I, H, W), input or output channels sharded.
        ((3, 3, 16, 8), P(None, None, "data", "model"), (-2, -4, -3)),
        ((3, 3, 16, 8), P(None, None, None, "data"), (-2, -4, -3)),
        # Layers stacked by a scan.
        ((8, 16, 16), P("data", "model", None), -2),
    ],
)
def test_several_axes_need_no_communication(mesh, shape, spec, axis):
    w = weights(shape)
    sharded = jax.device_put(w, NamedSharding(mesh, spec))
    compiled = compiled_mask(sharded, 2, 4, axis)
    assert not COLLECTIVES.findall(compiled.as_text())
    mask = compiled(sharded)
    assert mask.sharding.is_equivalent_to(sharded.sharding, mask.ndim)
    np.testing.assert_array_equal(mask, nm_mask(np.asarray(w), 2, 4, axis))


@pytest.mark.parametrize("n", [2, 4])
def test_mask_and_apply_keeps_the_type_on_explicit_meshes(n):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        w = jax.device_put(weights((32, 16)), NamedSharding(mesh, P("data", "model")))
        sparse = jax.eval_shape(lambda w: jnp.where(nm_mask(w, n, 4), w, 0), w)
        assert sparse.sharding == jax.typeof(w).sharding


@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [((24, 8), P("data"), -2), ((8, 6, 8), P(None, "model"), (-3, -2))],
)
def test_groups_across_shards_are_refused_on_explicit_meshes(shape, spec, axis):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        w = jax.device_put(weights(shape), NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=r"groups of 4 along axis .* cross shard boundaries"):
            jax.jit(lambda w: nm_mask(w, 2, 4, axis))(w)


def test_groups_across_shards_are_right_on_automatic_meshes():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    w = weights((24, 8))
    sharded = jax.device_put(w, NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(lambda w: nm_mask(w, 2, 4))(sharded), nm_mask(w, 2, 4))


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_2_4_mask_and_apply_needs_no_large_temporary(axis, dtype):
    w = jax.ShapeDtypeStruct((4096, 4096), dtype)
    for f in [lambda w: nm_mask(w, 2, 4, axis), lambda w: jnp.where(nm_mask(w, 2, 4, axis), w, 0)]:
        assert jax.jit(f).lower(w).compile().memory_analysis().temp_size_in_bytes <= MIB


@pytest.mark.optimized
@pytest.mark.parametrize(("n", "m"), [(4, 8), (1, 16), (8, 32)])
def test_medium_groups_store_one_word_each(n, m):
    w = jax.ShapeDtypeStruct((1024, 1024), "float32")
    temporary = compiled_mask(w, n, m, -2).memory_analysis().temp_size_in_bytes
    assert temporary <= 4 * math.prod(w.shape) // m + MIB // 16


@pytest.mark.optimized
@pytest.mark.parametrize(("n", "m"), FORMULATIONS)
def test_no_sort_gather_or_scatter(n, m):
    text = compiled_mask(jax.ShapeDtypeStruct((8 * m, 16), "float32"), n, m, -2).as_text()
    assert not re.findall(r" (sort|gather|scatter|top-k|topk|custom-call)\(", text)


@pytest.mark.optimized
@pytest.mark.parametrize(("n", "m"), FORMULATIONS)
def test_equal_masks_in_one_program_are_one_computation(n, m):
    """The forward pass and an optax transformation each ask for the mask of the same weights."""

    def step(w, g, masks):
        return jnp.where(masks[0], w, 0), g + 0.1 * jnp.where(masks[1], 0, w)

    def twice(w, g):
        return step(w, g, (nm_mask(w, n, m), nm_mask(w, n, m)))

    def once(w, g):
        mask = nm_mask(w, n, m)
        return step(w, g, (mask, mask))

    w = jax.ShapeDtypeStruct((8 * m, 16), "float32")
    assert operations(twice, w, w) == operations(once, w, w)


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
def test_asking_twice_for_the_masks_is_as_good_as_handing_them_over(pattern):
    module, x = nn.MultiHeadDotProductAttention(4), jnp.ones((2, 8, 32))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    plan = nmjax.make_plan(params, pattern)
    tx = optax.chain(nmjax.add_sparse_refined(plan, 0.1), optax.sgd(0.1, momentum=0.9))

    def step(params, opt_state, masks):
        def loss(params):
            sparse = nmjax.sparsify(params, plan, masks)
            return module.apply({"params": sparse}, x).sum()

        extra = {} if masks is None else {"masks": masks}
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    def asking_twice(params, opt_state):
        return step(params, opt_state, None)

    def handing_over(params, opt_state):
        return step(params, opt_state, nmjax.compute_masks(params, plan))

    state = params, tx.init(params)
    assert operations(asking_twice, *state) == operations(handing_over, *state)


def operations(f, *arguments):
    """The operations of the optimized program, in order, without names and metadata."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    return re.findall(r"= \S+ ([a-z-]+)\(", text)


def test_gpus_are_given_positions_as_constants():
    w = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    traced = jax.jit(lambda w: nm_mask(w, 2, 4)).trace(w)
    iota = {p: "iota" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")}
    assert iota == {"cuda": False, "cpu": True}

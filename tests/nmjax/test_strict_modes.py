"""Calls of everything public, for `make test-strict`, which repeats them under JAX's strict modes.

JAX can refuse NaN, mixed dtypes, mixed ranks and leaked tracers, compute in 64 bits, and run
without compiling. Users switch these modes on for whole programs, so nothing in nmjax may need
them off.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
import nmjax.linen
import nmjax.nnx
from nmjax.files import interchange, torch_layout
from tests.nmjax.packed_weights import prune_and_pack

pytestmark = pytest.mark.strict

# Each dtype with each kind of pattern.
WEIGHTS = [
    ("2:4", "float32"),
    ("1:16", "bfloat16"),
    ("2:4/kernel", "float32"),
    ("1x4@0.5", "float32"),
    ("1x4@0.5", "bfloat16"),
    ("1x4@0.5/layer", "float32"),
]
AXES = {
    "conv/kernel": nmjax.Axes((-2,), (-1,), (-4, -3)),
    "dense/kernel": nmjax.Axes((-2,), (-1,), ()),
}


def make_params(dtype="float32"):
    keys = jax.random.split(jax.random.key(0))
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 16, 8), dtype)},
        "dense": {"kernel": jax.random.normal(keys[1], (16, 8), dtype), "bias": jnp.ones(8, dtype)},
    }


def make_plan(params, pattern):
    axes = {name: axes for name, axes in AXES.items() if name.split("/")[0] in params}
    return nmjax.make_plan(params, pattern, axes=axes)


def total(params):
    return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(("pattern", "dtype"), WEIGHTS)
def test_masks_gradients_and_the_pull(pattern, dtype):
    params = make_params(dtype)
    plan = make_plan(params, pattern)
    masks = nmjax.compute_masks(params, plan)
    jax.grad(lambda p: total(nmjax.sparsify(p, plan, lambda_w=0.1)))(params)
    jax.grad(lambda p: total(nmjax.sparsify(p, plan, masks)))(params)
    tx = optax.chain(nmjax.add_sparse_refined(plan, lambda count: 0.1), optax.sgd(0.1))
    tx.update(params, tx.init(params), params, masks=masks)
    nmjax.check_sparse(nmjax.prune(params, plan), plan)
    print(plan, nmjax.sad(masks, masks), nmjax.total_sad(masks, masks))
    print(nmjax.flip_rate(masks, masks), nmjax.density(masks), nmjax.total_density(masks))
    kept = masks["dense/kernel"]
    for prune in (nmjax.prune_ste, lambda w, mask: nmjax.prune_sr_ste(w, mask, 0.1)):
        jax.grad(lambda w, prune=prune: total(prune(w, kept)))(params["dense"]["kernel"])


@pytest.mark.parametrize(("pattern", "dtype"), WEIGHTS)
def test_packed_weights(pattern, dtype, tmp_path):
    params = make_params(dtype)
    plan = make_plan(params, pattern)
    packed = nmjax.pack(nmjax.prune(params, plan), plan)
    x, images = jnp.ones((2, 16), dtype), jnp.ones((1, 4, 4, 16), dtype)
    for implementation in (None, "xla"):
        run = {"implementation": implementation}

        def loss(packed, x, run=run):
            bias = params["dense"]["bias"]
            y = nmjax.packed_matmul(x, packed["dense"]["kernel"], bias, activation="relu", **run)
            if not packed["conv"]["kernel"].taps:
                return total(y)
            return total(y) + total(nmjax.packed_conv(images, packed["conv"]["kernel"], **run))

        jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(packed, x)
        loss(packed, x)
    print(nmjax.sizes(packed))
    nmjax.save_packed(tmp_path / "packed.safetensors", packed)
    loaded = nmjax.unpack(nmjax.load_packed(tmp_path / "packed.safetensors", like=packed))
    jax.tree.map(np.testing.assert_array_equal, loaded, nmjax.prune(params, plan))
    nmjax.unpack_slow(packed)
    jax.jit(lambda p: nmjax.pack(nmjax.prune(p, plan), plan))(params)


def packed_matrix(pattern, dtype="float32"):
    """32 outputs, which the compiled kernels take for every pattern."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 32), dtype)}
    return prune_and_pack(params, nmjax.make_plan(params, pattern))["kernel"]


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5", "1x4@0.5/layer"])
def test_products_on_two_devices(pattern):
    packed, x, bias = packed_matrix(pattern), jnp.ones((4, 16)), jnp.ones(32)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put((packed, bias), NamedSharding(mesh, PartitionSpec()))

    def product(x, packed, bias):
        return nmjax.packed_matmul(x, packed, bias, activation="relu")

    grad = jax.grad(lambda *operands: total(product(*operands)), argnums=(0, 1), allow_int=True)
    jax.jit(grad)(rows, *whole)
    expected = np.maximum(x @ nmjax.unpack(packed) + 1, 0)
    for run in (product, jax.jit(product)):
        np.testing.assert_allclose(run(rows, *whole), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integer_values(dtype):
    packed, x = packed_matrix("2:4", dtype), jnp.ones((2, 16), dtype)
    integers = nmjax.quantize({"w": packed})["w"]
    expected = x @ integers.unpack() + jnp.ones((1, 32), dtype)
    y = nmjax.packed_matmul(x, integers, jnp.ones(32, dtype))
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y, expected)), atol=0.1)


@pytest.mark.parametrize(("n", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_other_masks(n, dtype):
    w = make_params(dtype)["dense"]["kernel"]
    nmjax.transposable_mask(w, n, 4)
    nmjax.nm_mask(w, n, 4, axis=-1)
    for score in ("l1", "l2", "bpar"):
        for uniform in (True, False):
            nmjax.block_mask(w, 4, 0.5, score, uniform=uniform)
    nmjax.block_mask(w, 4, 0.5, kept=jnp.int32(n))


def make_sparsifiers(params):
    plan, blocks = make_plan(params, "2:4"), make_plan(params, "1x4@0.5")
    ramp = nmjax.linear_ramp(0, 2)
    return [
        (plan, nmjax.straight_through(plan, lambda_w=0.1)),
        (plan, nmjax.one_shot(plan)),
        (plan, nmjax.one_shot(plan, at_step=1)),
        *(
            (blocks, nmjax.soft_uniform_blocks(blocks, ramp, score=score, variant=variant))
            for score in ("bpar", "l1")
            for variant in ("v1", "v2")
        ),
    ]


@pytest.mark.parametrize("which", range(7))
def test_methods(which):
    params = {"dense": make_params(["float32", "bfloat16"][which % 2])["dense"]}
    plan, method = make_sparsifiers(params)[which]
    state = method.init(params, jax.random.key(1))
    for step in range(3):
        state = method.refresh(state, params, step)
        jax.grad(lambda p, state=state: total(method.apply(p, state)))(params)
    nmjax.pack(method.export(params, state), plan)
    if which > 2:
        print(nmjax.blocks_per_row(state.masks, plan), nmjax.row_balance(state.masks, plan))
        nmjax.blocks_regrown(state.masks, state.masks, plan)


@pytest.mark.parametrize("ramp", ["cubic", "linear", "cosine", "exponential"])
def test_ramps(ramp):
    make = getattr(nmjax, f"{ramp}_ramp")
    value = make(1, 9, **({"rate": 0.1} if ramp == "exponential" else {}))
    for step in (5, jnp.int32(5), jnp.float32(5)):
        assert 0 < value(step) < 1


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(8)(x.mean((1, 2)))


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_linen(pattern):
    network, x = Network(), jnp.ones((2, 4, 4, 16))
    plan = nmjax.linen.make_plan(network, pattern, x)
    variables = network.init(jax.random.key(0), x)
    sparse = nmjax.linen.sparsify(network, plan)
    jax.grad(lambda v: sparse.apply(v, x).sum())(variables)
    folded = nmjax.linen.fold_batch_norm(network, variables, x)
    packed = {**folded, "params": nmjax.pack(nmjax.prune(folded["params"], plan), plan)}
    jax.jit(nmjax.linen.packed_apply(network))(packed, x)
    print(nmjax.linen.cost(network, plan, x))


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_nnx(pattern, tmp_path):
    model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 16))
    plan = nmjax.nnx.make_plan(model, pattern, inputs=(x,))
    nnx.grad(lambda model: nmjax.nnx.sparsify(model, plan)(x).sum())(model)
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    packed(x)
    nmjax.nnx.save(tmp_path / "model.safetensors", packed)
    nmjax.nnx.load(tmp_path / "model.safetensors", nnx.Linear(16, 8, rngs=nnx.Rngs(1)))
    print(nmjax.nnx.cost(model, plan, x))


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"]


def test_programs():
    params = {"up": {"kernel": jnp.ones((8, 16))}, "down": {"kernel": jnp.ones((16, 8))}}
    x = jnp.ones((2, 8))
    plan = nmjax.make_plan(params, "2:4", forward=mlp, inputs=(x,))
    nmjax.check_axes(plan, mlp, params, x)
    print(nmjax.cost(mlp, params, x, plan=plan), nmjax.backends())
    channels = nmjax.find_channels(mlp, params, x)
    nmjax.sort_channels(params, channels)
    nmjax.check_sharding(params, plan)


def test_other_formats():
    # PyTorch's kernels take no smaller matrices.
    kernel = jax.random.normal(jax.random.key(0), (64, 32), "float16")
    params = {"dense": {"kernel": kernel, "bias": jnp.ones(32, "float16")}}
    for pattern in ("2:4", "1x4@0.5"):
        plan = make_plan(params, pattern)
        packed = nmjax.pack(nmjax.prune(params, plan), plan)
        convert = interchange.to_bsr if "x" in pattern else interchange.to_semi_structured
        convert(packed["dense"]["kernel"])
    torch_layout.from_torch(torch_layout.to_torch(params, plan=plan), params, plan=plan)

"""Unchanged Flax modules on packed parameters, against the same modules on pruned ones."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.linen import make_plan, packed_apply
from tests.nmjax.packed_weights import prune_and_pack

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 16)), jnp.float32)


class Network(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (3, 3), strides=2, padding="CIRCULAR", dtype=self.dtype)(x)
        x = nn.Conv(32, (3, 3), kernel_dilation=2, use_bias=False, dtype=self.dtype)(nn.relu(x))
        x = x.reshape(x.shape[0], -1, 32)
        x = nn.MultiHeadDotProductAttention(4, dtype=self.dtype)(x, x)
        x = nn.DenseGeneral((4, 8), dtype=self.dtype, name="general")(x)
        x = nn.DenseGeneral(32, axis=(-2, -1), dtype=self.dtype, name="back")(x)
        return nn.Dense(16, dtype=self.dtype, name="head")(x)


def pruned_and_packed(module, x, pattern, **selection):
    variables = module.init(jax.random.key(0), x)
    plan = make_plan(module, pattern, x, **selection)
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    pruned = {**rest, "params": nmjax.prune(variables["params"], plan)}
    return pruned, {**rest, "params": prune_and_pack(variables["params"], plan)}


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_a_network_gives_what_its_pruned_parameters_give(pattern, dtype):
    network = Network(dtype)
    pruned, packed = pruned_and_packed(network, X, pattern)
    expected = network.apply(pruned, X)
    y = jax.jit(packed_apply(network))(packed, X)
    assert y.dtype == expected.dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
    np.testing.assert_allclose(y, np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance)


def test_layers_left_dense_and_other_methods():
    class Two(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(16), nn.Dense(16)

        def __call__(self, x):
            return self.second(nn.relu(self.first(x)))

        def half(self, x):
            return self.first(x)

    pruned, packed = pruned_and_packed(Two(), X, "2:4", exclude=["second"])
    apply = jax.jit(packed_apply(Two()), static_argnames="method")
    np.testing.assert_allclose(apply(packed, X), Two().apply(pruned, X), rtol=1e-5, atol=1e-5)
    half = apply(packed, X, method="half")
    np.testing.assert_allclose(half, Two().apply(pruned, X, method="half"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5", "2:4/kernel"])
def test_a_convolution_planned_along_its_outputs(pattern):
    layer = nn.Conv(16, (3, 3))
    params = layer.init(jax.random.key(0), X)["params"]
    plan = nmjax.make_plan(params, pattern, axes={"kernel": nmjax.Axes(-1, -2, (-4, -3))})
    expected = layer.apply({"params": nmjax.prune(params, plan)}, X)
    got = packed_apply(layer)({"params": prune_and_pack(params, plan)}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.remat(nn.Dense)(16)(x)), None


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_scanned_and_rematerialized_layers(pattern):
    pruned, packed = pruned_and_packed(Scanned(), X, pattern)
    y = jax.jit(packed_apply(Scanned()))(packed, X)
    np.testing.assert_allclose(y, Scanned().apply(pruned, X), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_kept_values():
    model = nn.Dense(16)
    pruned, packed = pruned_and_packed(model, X, "1x4@0.5")
    grads = jax.jit(jax.grad(lambda v: packed_apply(model)(v, X).sum(), allow_int=True))(packed)
    dense = jax.grad(lambda v: model.apply(v, X).sum())(pruned)["params"]["kernel"]
    params = {"kernel": pruned["params"]["kernel"]}
    masks = {"kernel": pruned["params"]["kernel"] != 0}
    plan = nmjax.make_plan(params, "1x4@0.5")
    expected = nmjax.pack({"kernel": dense}, plan, masks)["kernel"].values
    np.testing.assert_allclose(grads["params"]["kernel"].values, expected, rtol=1e-4, atol=1e-4)


def test_boxed_parameters():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    model = nn.Conv(16, (3, 3), kernel_init=boxed)
    pruned, packed = pruned_and_packed(model, X, "1x4@0.5")
    y = jax.jit(packed_apply(model))(packed, X)
    np.testing.assert_allclose(y, model.apply(pruned, X), rtol=1e-5, atol=1e-5)
    # With a mesh in sight Flax would ask for the dense kernel's sharding of the packed arrays.
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((4,), ("model",), auto, devices=jax.devices()[:4])):
        np.testing.assert_allclose(jax.jit(packed_apply(model))(packed, X), y, rtol=1e-5, atol=1e-5)


class Noisy(nn.Dense):
    """A layer of its own around Flax's: more variables, and random numbers."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("counts", "calls", lambda: 0)
        calls.value += 1
        self.sow("intermediates", "input", x)
        noise = jax.random.normal(self.make_rng("noise"), (1, 1, 1, self.features))
        return super().__call__(x) + noise


def test_a_subclass_runs_once_and_where_it_stands():
    model, rngs = Noisy(16), {"noise": jax.random.key(1)}
    params = model.init({"params": jax.random.key(0), **rngs}, X)["params"]
    plan = nmjax.make_plan(params, "2:4")
    counts = {"calls": 0}
    settings = {"rngs": rngs, "mutable": ["counts", "intermediates"]}
    pruned = {"params": nmjax.prune(params, plan), "counts": counts}
    packed = {"params": prune_and_pack(params, plan), "counts": counts}
    expected, _ = model.apply(pruned, X, **settings)
    y, changed = packed_apply(model)(packed, X, **settings)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert changed["counts"]["calls"] == 1
    assert len(changed["intermediates"]["input"]) == 1


@pytest.mark.optimized
def test_nobody_reads_the_unpacked_kernel():
    if not nmjax.backends()["ffi"].startswith("ready: avx"):
        pytest.skip("the kernel is unpacked here")
    model = nn.Dense(48)
    _, packed = pruned_and_packed(model, X, "1x16@0.75")
    text = jax.jit(packed_apply(model)).lower(packed, X).compile().as_text()
    assert "nmjax_blocks" in text
    assert "16,48" not in text


def test_layers_that_read_a_packed_leaf_themselves_are_named():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.lecun_normal(), (16, 32))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Own(name="inner")(x)

    _, packed = pruned_and_packed(Outer(), X, "2:4")
    with pytest.raises(TypeError, match=r"Own at inner .*kernel.*exclude"):
        packed_apply(Outer())(packed, X)
    with pytest.raises(TypeError, match="linen module"):
        packed_apply(lambda x: x)


EXPORT = """
import sys
import jax, jax.export, jax.numpy as jnp, numpy as np
import nmjax
assert nmjax.backends()["ffi"]
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[2], exported.call(jnp.asarray(np.load(sys.argv[3]))))
"""


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_an_exported_network_runs_in_a_fresh_process(pattern, tmp_path):
    model = nn.Dense(16)
    _, packed = pruned_and_packed(model, X, pattern)
    function = jax.jit(lambda x: packed_apply(model)(packed, x))
    names = ("nmjax_blocks", "nmjax_groups")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    exported = jax.export.export(function, platforms=["cpu"], disabled_checks=checks)(X)
    (tmp_path / "model").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", X)
    files = [str(tmp_path / name) for name in ("model", "y.npy", "x.npy")]
    subprocess.run([sys.executable, "-c", EXPORT, *files], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), function(X), rtol=1e-6, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped_convolutions_beside_packed_layers(dtype):
    class Separable(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3), strides=2, feature_group_count=16, dtype=dtype, name="own")(x)
            x = nn.Conv(32, (3, 3), feature_group_count=16, dtype=dtype, name="two each")(x)
            return nn.Conv(16, (1, 1), dtype=dtype, name="mixed")(nn.relu(x))

    pruned, packed = pruned_and_packed(Separable(), X, "1x4@0.5", include=["mixed"])
    run = jax.jit(packed_apply(Separable()))
    y, expected = run(packed, X), Separable().apply(pruned, X)
    assert y.dtype == expected.dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
    np.testing.assert_allclose(
        y.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )
    # One channel a group becomes a sum, which XLA fuses; sixteen groups stay a convolution.
    assert run.lower(packed, X).compile().as_text().count(" convolution(") == 1

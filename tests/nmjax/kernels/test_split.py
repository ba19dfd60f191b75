"""Compiled kernels on the automatic axes of a mesh: each device computes its part, alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.kernels.cpu.library import load_library
from tests.nmjax.packed_weights import prune_and_pack

pytestmark = pytest.mark.skipif(
    load_library().instruction_set is None, reason=f"no kernels: {load_library().reason}"
)

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def numbers(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def packed_weight(shape, pattern):
    params = {"layer": {"kernel": numbers(shape, 0)}}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    plan = nmjax.make_plan(params, pattern, axes={"kernel": axes})
    return prune_and_pack(params, plan)["layer"]["kernel"]


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), (axis_type,) * 2, devices=jax.devices()[:4])


def put_weight(packed, axis, mesh):
    """Its outputs over an axis of the mesh, or whole."""

    def spec(array):
        return (
            P(*[None] * (array.ndim - 1), axis) if ":" in str(packed.leaf_plan.pattern) else P(axis)
        )

    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec(a))), packed)


def collectives(compiled):
    text = compiled.as_text()
    return [name for name in COLLECTIVES if f"{name}(" in text]


@pytest.mark.optimized
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("pattern", "batch_axis", "output_axis"),
    [
        ("2:4", "data", None),
        ("2:4", None, "model"),
        ("2:4", "data", "model"),
        ("1x4@0.5", "data", None),
        ("1x4@0.5", "data", "model"),
        ("1x4@0.5/layer", "data", None),
    ],
)
def test_batch_and_outputs_stay_where_they_are(pattern, batch_axis, output_axis, with_bias):
    mesh, x, packed = make_mesh(), numbers((8, 16)), packed_weight((16, 64), pattern)
    bias = numbers((64,), 2) if with_bias else None
    expected = np.maximum(x @ nmjax.unpack(packed) + (bias[None] if with_bias else 0), 0)
    x = jax.device_put(x, NamedSharding(mesh, P(batch_axis)))
    packed = put_weight(packed, output_axis, mesh)

    @jax.jit
    def product(x, packed):
        return nmjax.packed_matmul(x, packed, bias, activation="relu", implementation="ffi")

    compiled = product.lower(x, packed).compile()
    assert "nmjax_" in compiled.as_text()
    assert collectives(compiled) == []
    y = product(x, packed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(batch_axis, output_axis)), 2)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.optimized
def test_images_stay_where_they_are():
    mesh, images = make_mesh(), numbers((4, 6, 6, 8))
    packed = packed_weight((3, 3, 8, 32), "1x4@0.5")
    expected = nmjax.packed_conv(images, packed, implementation="xla")
    placed = jax.device_put(images, NamedSharding(mesh, P("data")))
    whole = put_weight(packed, None, mesh)
    conv = jax.jit(lambda x, packed: nmjax.packed_conv(x, packed, implementation="ffi"))
    assert collectives(conv.lower(placed, whole).compile()) == []
    y = conv(placed, whole)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 4)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    # Pixels need their neighbors: rows of an image are gathered.
    rows = jax.device_put(images, NamedSharding(mesh, P(None, "data")))
    np.testing.assert_allclose(conv(rows, whole), expected, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
@pytest.mark.parametrize("spec", [P(None, "data"), P(("data", "model"))])
def test_what_cannot_be_split_is_gathered_and_right(pattern, spec):
    """Sharded inputs; and 16 outputs, fewer than the devices' vectors take."""
    mesh, x, packed = make_mesh(), numbers((8, 16)), packed_weight((16, 16), pattern)
    expected = x @ nmjax.unpack(packed)
    x = jax.device_put(x, NamedSharding(mesh, spec))
    product = jax.jit(lambda x, packed: nmjax.packed_matmul(x, packed, implementation="ffi"))
    y = product(x, put_weight(packed, "model", mesh))
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_outputs_that_some_devices_would_have_steps_of():
    """Two steps of 16 outputs on four devices."""
    mesh, x, packed = make_mesh(), numbers((8, 16)), packed_weight((16, 32), "2:4")
    product = jax.jit(lambda x, packed: nmjax.packed_matmul(x, packed, implementation="ffi"))
    y = product(
        jax.device_put(x, NamedSharding(mesh, P())), put_weight(packed, ("data", "model"), mesh)
    )
    np.testing.assert_allclose(y, x @ nmjax.unpack(packed), atol=1e-4)


def test_gradients_and_mapped_layers_on_a_mesh():
    mesh, x = make_mesh(), numbers((8, 16))
    packed = packed_weight((16, 64), "2:4")
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))

    def loss(x, implementation):
        return (nmjax.packed_matmul(x, packed, implementation=implementation) ** 2).sum()

    found, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(argument, implementation)
        for argument, implementation in ((placed, "ffi"), (x, "xla"))
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), packed)
    y = jax.jit(jax.vmap(nmjax.packed_matmul, (None, 0)))(placed, stack)
    np.testing.assert_allclose(y[1], x @ nmjax.unpack(packed), atol=1e-4)


def test_operands_of_no_mesh_with_a_mesh_in_sight():
    x, packed = numbers((8, 16)), packed_weight((16, 64), "2:4")
    product = jax.jit(lambda x, packed: nmjax.packed_matmul(x, packed, implementation="ffi"))
    with jax.set_mesh(make_mesh()):
        np.testing.assert_allclose(product(x, packed), x @ nmjax.unpack(packed), atol=1e-4)


def test_whole_operands_on_an_explicit_mesh():
    mesh, x, packed = make_mesh(AxisType.Explicit), numbers((8, 16)), packed_weight((16, 64), "2:4")
    expected = x @ nmjax.unpack(packed)
    with jax.set_mesh(mesh):
        x, packed = jax.device_put((x, packed), NamedSharding(mesh, P()))
        y = jax.jit(lambda x, packed: nmjax.packed_matmul(x, packed, implementation="ffi"))(
            x, packed
        )
    np.testing.assert_allclose(y, expected, atol=1e-4)

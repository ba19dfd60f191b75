"""Whether shards cut groups or blocks, against which device really holds which weight."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.masks.shards import holds_whole

MESH = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
ABSTRACT = AbstractMesh((4, 2), ("data", "model"))


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def runs(shape, leaf):
    """A number for each weight: equal for those that a mask has to see together."""
    ndim, pattern = len(shape), leaf.pattern
    places = np.indices(shape)

    def along(axes):
        flat = np.zeros(shape, int)
        for axis in axes:
            flat = flat * shape[axis] + places[axis + ndim]
        return flat

    stack = [
        axis
        for axis in range(-ndim, 0)
        if axis not in (*leaf.reduction_axes, *leaf.output_axes, *leaf.tap_axes)
    ]
    if isinstance(pattern, nmjax.NM):
        others = [axis for axis in range(-ndim, 0) if axis not in leaf.reduction_axes]
        keys = [along(leaf.reduction_axes) // pattern.m, along(others)]
    else:
        rows = along(leaf.output_axes) // (pattern.n if pattern.uniform else 10**9)
        keys = [rows, along(stack)]
    return keys[0] * 10**6 + keys[1]


def is_cut(shape, leaf, sharding):
    """Whether a device holds some weights of a run and lacks others: counted, weight by weight."""
    run = runs(shape, leaf)
    whole = dict(zip(*np.unique(run, return_counts=True), strict=True))
    return any(
        whole[number] != count
        for index in set(map(str, sharding.devices_indices_map(shape).values()))
        for number, count in zip(*np.unique(run[eval(index)], return_counts=True), strict=True)
    )


@st.composite
def cases(draw):
    """A plan for one leaf of up to four axes, and a sharding that divides it."""
    kind = draw(st.sampled_from(["dense", "conv", "out", "query", "kernel"]))
    size = st.sampled_from([2, 4, 6, 8, 12, 16])
    shape = tuple(draw(size) for _ in range({"dense": 2, "conv": 4, "kernel": 4}.get(kind, 3)))
    if draw(st.booleans()) and kind == "dense":
        shape = (draw(size), *shape)
    patterns = ["1:2", "2:4", "2:3", "1:8"]
    patterns += ["1x2@0.5", "1x4@0.5", "1x2@0.5/layer"] if kind in ("dense", "conv") else []
    pattern = draw(st.sampled_from(patterns)) + ("/kernel" if kind == "kernel" else "")
    axes = {
        "dense": nmjax.Axes((-2,), (-1,)),
        "conv": nmjax.Axes((-2,), (-1,), (-4, -3)),
        "kernel": nmjax.Axes((-2,), (-1,), (-4, -3)),
        "out": (-3, -2),
        "query": (-3,),
    }[kind]
    entries, left = [], ["data", "model"]
    for size in shape:
        options = [
            (),
            *((name,) for name in left),
            *([("data", "model")] if len(left) == 2 else []),
        ]
        entry = draw(st.sampled_from(options))
        if size % math.prod(MESH.shape[name] for name in entry):
            entry = ()
        left = [name for name in left if name not in entry]
        entries.append(entry or None)
    return shape, pattern, axes, P(*entries)


@settings(max_examples=60)
@given(cases())
def test_what_is_refused_is_what_devices_hold_in_part(case):
    shape, pattern, axes, spec = case
    params = shapes(kernel=shape)
    try:
        plan = nmjax.make_plan(params, pattern, axes={"kernel": axes})
    except ValueError:  # m or N does not divide it.
        return
    cut = is_cut(shape, plan["kernel"], NamedSharding(MESH, spec))
    for mesh in (MESH, EXPLICIT, ABSTRACT):
        try:
            nmjax.check_sharding(params, plan, {"kernel": NamedSharding(mesh, spec)})
            refused = False
        except ValueError:
            refused = True
        assert refused == cut


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=3),
    st.integers(1, 12),
)
def test_whole_runs_lie_in_one_shard(parts, m):
    """`holds_whole`, against the shard number of every entry in flattened order."""
    shards, sizes = [count for count, _ in parts], [count * held for count, held in parts]
    places = np.indices(sizes).reshape(len(sizes), -1)
    number = sum(
        place // (size // count) * 10**j
        for j, (place, size, count) in enumerate(zip(places, sizes, shards, strict=True))
    )
    runs = [number[start : start + m] for start in range(0, len(number) // m * m, m)]
    if math.prod(sizes) % m == 0:
        assert holds_whole(sizes, shards, m) == all(len(set(run)) == 1 for run in runs)


def test_every_cut_leaf_is_named_with_axis_mesh_axis_and_cure():
    params = shapes(a=(48, 32), b=(64, 32), c=(3, 3, 12, 8))
    plan = nmjax.make_plan(params, "2:4", axes={"": (-2,)})
    specs = {"a": P(("data", "model")), "b": P("data"), "c": P(None, None, "model", "data")}
    with pytest.raises(ValueError) as error:
        nmjax.check_sharding(params, plan, specs, mesh=MESH)
    message = str(error.value)
    assert (
        "a (48, 32): mesh axes 'data', 'model' split axis -2 into 8 shards of 6, which cuts groups"
        " of 4;\n    use 2 or 3 or 4 or 6 or 12 shards, or split axis -1"
    ) in message
    assert "c (3, 3, 12, 8): mesh axis 'model' splits axis -2 into 2 shards of 6" in message
    assert "use 3 shards, or split axis -4 or -3 or -1" in message
    assert "  b " not in message


@pytest.mark.parametrize(
    ("pattern", "spec", "message"),
    [
        ("1x4@0.5", P(None, None, None, "model"), "4 shards of 2, which cuts blocks of 4 outputs"),
        ("1x4@0.5", P(None, None, "model"), "which cuts the blocks of a row, which compete"),
        ("1x4@0.5", P("model"), "which cuts blocks, which hold all taps"),
        ("1x4@0.5/layer", P(None, None, None, "model"), "the layer, whose blocks compete"),
    ],
)
def test_blocks_rows_taps_and_layers(pattern, spec, message):
    params = shapes(kernel=(4, 4, 8, 8))
    conv = nmjax.Axes(reduction=(-2,), output=(-1,), taps=(-4, -3))
    plan = nmjax.make_plan(params, pattern, axes={"kernel": conv})
    mesh = AbstractMesh((4,), ("model",))
    with pytest.raises(ValueError, match=message):
        nmjax.check_sharding(params, plan, spec, mesh=mesh)


def test_shardings_may_be_those_of_arrays_a_prefix_or_the_meshs_of_the_context():
    params = {"a": {"kernel": jnp.ones((24, 8))}, "b": {"kernel": jnp.ones((32, 8))}}
    plan = nmjax.make_plan(params, "2:4")
    spec = P(("data", "model"))
    placed = jax.device_put(params, NamedSharding(MESH, spec))
    cut = r"a/kernel \(24, 8\): mesh axes 'data', 'model' split axis -2 into 8 shards of 3"
    with pytest.raises(ValueError, match=cut):
        nmjax.check_sharding(placed, plan)
    with pytest.raises(ValueError, match=cut):
        nmjax.check_sharding(params, plan, {"a": spec, "b": P()}, mesh=MESH)
    with jax.set_mesh(MESH), pytest.raises(ValueError, match=cut):
        nmjax.check_sharding(params, plan, spec)
    nmjax.check_sharding(params, plan)  # One device holds everything.
    nmjax.check_sharding(placed, plan, SingleDeviceSharding(jax.devices()[0]))
    nmjax.check_sharding(params, plan, {"a": P(), "b": spec}, mesh=EXPLICIT)
    abstract = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match=r"no sharding for a/kernel, b/kernel"):
        nmjax.check_sharding(abstract, plan)


def test_boxed_leaves_have_the_names_of_the_plain():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(8, kernel_init=init, name="layer")(x)

    params = Layer().init(jax.random.key(0), jnp.ones((1, 12)))["params"]
    plan = nmjax.make_plan(params, "2:4")
    nmjax.check_sharding(params, plan, nn.get_partition_spec(params), mesh=MESH)
    with pytest.raises(ValueError, match=r"layer/kernel .* cuts groups of 4"):
        nmjax.check_sharding(params, plan, {"layer": P("model")}, mesh=MESH)


def test_what_cannot_be_a_sharding():
    params = shapes(kernel=(12, 8))
    plan = nmjax.make_plan(params, "2:4")
    with pytest.raises(ValueError, match=r"kernel \(12, 8\): it cannot be split this way: .*8"):
        nmjax.check_sharding(params, plan, P(("data", "model")), mesh=MESH)
    with pytest.raises(ValueError, match=r"kernel: .* needs a mesh"):
        nmjax.check_sharding(params, plan, P("data"))
    with pytest.raises(TypeError, match="kernel: expected a sharding or a PartitionSpec, got 3"):
        nmjax.check_sharding(params, plan, {"kernel": 3})
    with pytest.raises(ValueError, match="kernel: planned as"):
        nmjax.check_sharding(shapes(kernel=(8, 8)), plan, P(), mesh=MESH)


@pytest.mark.optimized
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_what_passes_needs_no_communication_and_what_fails_does(axis_type):
    mesh = jax.make_mesh((8,), ("d",), (axis_type,))
    for size, spec, passes in [(32, P("d"), True), (48, P("d"), False), (48, P(None, "d"), True)]:
        params = {"kernel": jax.device_put(jnp.ones((size, 16)), NamedSharding(mesh, spec))}
        plan = nmjax.make_plan(params, "2:4")
        if not passes:
            with pytest.raises(ValueError, match="8 shards of 6"):
                nmjax.check_sharding(params, plan)
            if axis_type == AxisType.Explicit:
                continue  # The mask itself refuses.
        else:
            nmjax.check_sharding(params, plan)
        with jax.set_mesh(mesh):
            text = jax.jit(nmjax.compute_masks).lower(params, plan).compile().as_text()
        assert ("all-gather" in text or "collective-permute" in text) != passes

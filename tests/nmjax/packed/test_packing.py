"""Packed trees: exact, whatever the tree; and what is refused."""

from dataclasses import dataclass

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, PartitionSpec

import nmjax
from nmjax import PackedBlocks, PackedNM
from tests.nmjax.float_bits import DTYPES, any_bits, bits_of
from tests.nmjax.packed_weights import prune_and_pack

RNG = np.random.default_rng(0)
SHAPES = {
    "conv": {"kernel": (3, 3, 8, 4), "bias": (4,)},
    "attention": {
        "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
        "out": {"kernel": (2, 4, 8), "bias": (8,)},
    },
    "dense": {"kernel": (8, 4)},
}
PATTERNS = ["2:4", "4:8", "1:8/kernel", "1x4@0.5", "1x2@0.6/layer"]


def make_params(dtype="float32"):
    return jax.tree.map(
        lambda shape: any_bits(RNG, shape, dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def normal_params():
    return jax.tree.map(
        lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = normal_params()
PLAN = nmjax.make_plan(PARAMS, "2:4", rules={"dense": "1x2@0.5"})


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits_of(x), bits_of(y)), a, b)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        *((p, "float32") for p in PATTERNS[::2]),
        *(pytest.param(p, "float32", marks=pytest.mark.slow) for p in PATTERNS[1::2]),
        *(pytest.param(p, d, marks=pytest.mark.slow) for p in PATTERNS[::4] for d in DTYPES[1:]),
    ],
)
def test_unpack_of_pack_is_prune(pattern, dtype):
    """Against masks applied to bits: XLA's own selection quiets NaNs of narrow dtypes."""
    params = make_params(dtype)
    plan = nmjax.make_plan(params, pattern)
    masks = nmjax.compute_masks(params, plan)

    def pruned(name, leaf):
        bits = bits_of(leaf)
        return np.where(masks[name], bits, 0) if name in masks else bits

    out = nmjax.unpack(nmjax.pack(params, plan, masks))
    assert jax.tree.structure(out) == jax.tree.structure(params)
    for name, leaf in nmjax.trees.leaves.named_leaves(out).items():
        assert leaf.dtype == dtype
        expected = pruned(name, nmjax.trees.leaves.named_leaves(params)[name])
        np.testing.assert_array_equal(bits_of(leaf), expected, err_msg=name)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unpack_of_pack_is_prune_inside_jit(pattern):
    plan = nmjax.make_plan(PARAMS, pattern)
    packed = jax.jit(nmjax.pack)(PARAMS, plan)
    assert_same_bits(jax.jit(nmjax.unpack)(packed), nmjax.prune(PARAMS, plan))
    assert_same_bits(packed, nmjax.pack(PARAMS, plan, nmjax.compute_masks(PARAMS, plan)))
    assert_same_bits(packed, prune_and_pack(PARAMS, plan))


def test_planned_leaves_are_packed_and_others_untouched():
    packed = prune_and_pack(PARAMS, PLAN)
    assert isinstance(packed["conv"]["kernel"], PackedNM)
    assert isinstance(packed["dense"]["kernel"], PackedBlocks)
    assert packed["conv"]["bias"] is PARAMS["conv"]["bias"]
    assert packed["conv"]["kernel"].leaf_plan == PLAN["conv/kernel"]


def test_given_masks_win():
    masks = {name: ~mask for name, mask in nmjax.compute_masks(PARAMS, PLAN).items()}
    packed = nmjax.pack(PARAMS, PLAN, masks)
    assert_same_bits(nmjax.unpack(packed), nmjax.prune(PARAMS, PLAN, masks))
    traced = jax.jit(nmjax.pack)(PARAMS, PLAN, masks)
    assert_same_bits(nmjax.unpack(traced), nmjax.prune(PARAMS, PLAN, masks))


def test_packed_leaves_are_not_packed_again():
    packed = prune_and_pack(PARAMS, PLAN)
    with pytest.raises(ValueError, match=r"packed already: .*dense/kernel.*nmjax.unpack"):
        nmjax.pack(packed, PLAN)
    rest = nmjax.make_plan(PARAMS, "2:4", include="attention")
    part = nmjax.make_plan(PARAMS, "2:4", include="dense")
    both = nmjax.pack(prune_and_pack(nmjax.prune(PARAMS, part), rest), part)
    assert isinstance(both["attention"]["out"]["kernel"], PackedNM)
    assert isinstance(both["dense"]["kernel"], PackedNM)


def test_numpy_parameters():
    packed = nmjax.pack(jax.tree.map(np.asarray, nmjax.prune(PARAMS, PLAN)), PLAN)
    assert_same_bits(nmjax.unpack(packed), nmjax.prune(PARAMS, PLAN))


# Trees


@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])

TREES = {
    "dict": lambda k, b: {"layer": {"kernel": k, "bias": b}},
    "FrozenDict": lambda k, b: flax.core.freeze({"layer": {"kernel": k, "bias": b}}),
    "dataclass": lambda k, b: {"layer": Layer(k, b)},
    "boxed": lambda k, b: {"layer": {"kernel": nn.Partitioned(k, ("in", "out")), "bias": b}},
    "list": lambda k, b: {"layer": [{"kernel": k}, b]},
}


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("pattern", ["1:4", "1x2@0.5"])
def test_every_kind_of_tree_keeps_its_kind(kind, pattern):
    params = TREES[kind](PARAMS["dense"]["kernel"], jnp.ones(4))
    plan = nmjax.make_plan(params, pattern)
    packed = prune_and_pack(params, plan)
    assert jax.tree.structure(packed, is_leaf=nmjax.packed.weight.is_packed) == jax.tree.structure(
        params
    )
    assert_same_bits(nmjax.unpack(packed), nmjax.prune(params, plan))


def test_nnx_states():
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
    plan = nmjax.make_plan(state, "2:4")
    packed = prune_and_pack(state, plan)
    assert list(nmjax.sizes(packed).leaves) == ["bias", "kernel"]
    assert_same_bits(nmjax.unpack(packed), nmjax.prune(state, plan))


def test_stacked_layers_are_packed_mapped_and_scanned():
    layers = [normal_params() for _ in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    packed = prune_and_pack(stack, PLAN)
    assert_same_bits(nmjax.unpack(packed), nmjax.prune(stack, PLAN))
    assert_same_bits(jax.vmap(lambda p: nmjax.pack(p, PLAN))(stack), packed)
    second = jax.tree.map(lambda x: x[1], packed)
    assert_same_bits(nmjax.unpack(second), nmjax.prune(layers[1], PLAN))
    _, scanned = jax.lax.scan(lambda _, p: (None, nmjax.unpack(p)), None, packed)
    assert_same_bits(scanned, nmjax.prune(stack, PLAN))


def test_a_packed_tree_goes_where_trees_go():
    packed = prune_and_pack(PARAMS, PLAN)
    pruned = nmjax.prune(PARAMS, PLAN)
    leaves, structure = jax.tree.flatten(packed)
    stored = [np.asarray(leaf) for leaf in leaves]  # A checkpoint by flattening.
    assert_same_bits(nmjax.unpack(jax.tree.unflatten(structure, stored)), pruned)
    assert_same_bits(nmjax.unpack(jax.device_put(packed, jax.devices()[1])), pruned)
    assert_same_bits(nmjax.unpack(jax.jit(lambda p: p)(packed)), pruned)
    halved = jax.tree.map(lambda x: x / 2 if jnp.issubdtype(x.dtype, jnp.floating) else x, packed)
    assert_same_bits(nmjax.unpack(halved), jax.tree.map(lambda x: x / 2, pruned))
    shapes = jax.eval_shape(nmjax.unpack, jax.eval_shape(lambda p: nmjax.pack(p, PLAN), PARAMS))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, PARAMS)


def test_flax_serialization_of_the_arrays():
    packed = prune_and_pack(PARAMS, PLAN)
    leaves, structure = jax.tree.flatten(packed)
    restored = serialization.from_bytes(leaves, serialization.to_bytes(leaves))
    assert_same_bits(jax.tree.unflatten(structure, restored), packed)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_reach_the_kept_values(pattern):
    """The gradient is a packed tree: the dense one at the kept weights."""
    plan = nmjax.make_plan(PARAMS, pattern)
    packed = prune_and_pack(PARAMS, plan)
    weight = jax.tree.map(jnp.cos, PARAMS)

    def loss(params):
        return sum(jax.tree.leaves(jax.tree.map(lambda w, x: (w * x).sum(), weight, params)))

    arrays, structure = jax.tree.flatten(packed)
    floating = [i for i, x in enumerate(arrays) if x.dtype == jnp.float32]

    def packed_loss(values):
        leaves = dict(enumerate(arrays)) | dict(zip(floating, values, strict=True))
        return loss(nmjax.unpack(jax.tree.unflatten(structure, leaves.values())))

    values = [arrays[i] for i in floating]
    grads = jax.jit(jax.grad(packed_loss))(values)
    expected = nmjax.pack(weight, plan, nmjax.compute_masks(PARAMS, plan))
    wanted = [x for x in jax.tree.leaves(expected) if x.dtype == jnp.float32]
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_array_equal(got, want)


# Bad input


def test_masks_that_keep_too_much():
    masks = nmjax.compute_masks(PARAMS, PLAN)
    wrong = {**masks, "conv/kernel": masks["conv/kernel"].at[0, 0, :4, 0].set(True)}
    wrong["dense/kernel"] = jnp.ones((8, 4), bool)
    with pytest.raises(ValueError, match="keep more than the plan") as error:
        nmjax.pack(PARAMS, PLAN, wrong)
    assert "conv/kernel (3, 3, 8, 4): 1 of 72 groups keep more than 2:4" in str(error.value)
    assert "dense/kernel (8, 4): 8 of 16 blocks are more than 1x2@0.5" in str(error.value)
    assert "attention" not in str(error.value)
    poisoned = nmjax.unpack(jax.jit(nmjax.pack)(PARAMS, PLAN, wrong))
    assert jnp.isnan(poisoned["conv"]["kernel"]).sum() == 2
    assert jnp.isnan(poisoned["dense"]["kernel"]).sum() == 16


@pytest.mark.not_under("jax_debug_nans")
def test_weights_that_are_not_sparse_are_not_packed():
    spoilt = jax.tree.map(jnp.array, nmjax.prune(PARAMS, PLAN))
    kernel = spoilt["attention"]["out"]["kernel"]
    spoilt["attention"]["out"]["kernel"] = kernel.at[0, :, 5].set(jnp.nan)
    with pytest.raises(ValueError, match=r"export.*prune\(params.*masks=") as error:
        nmjax.pack(spoilt, PLAN)
    assert "attention/out/kernel (2, 4, 8): 2 of 64 weights would be dropped" in str(error.value)
    assert "conv" not in str(error.value)
    with pytest.raises(ValueError, match="drop weights") as error:
        nmjax.pack(jax.tree.map(np.asarray, PARAMS), PLAN)
    assert "conv/kernel (3, 3, 8, 4): 144 of 288" in str(error.value)
    assert "dense/kernel (8, 4): 16 of 32" in str(error.value)


@pytest.mark.not_under("jax_debug_nans")
def test_zeros_and_nans_among_the_kept_weights_are_packed():
    pruned = jax.tree.map(jnp.array, nmjax.prune(PARAMS, PLAN))
    pruned["conv"]["kernel"] = jnp.zeros_like(pruned["conv"]["kernel"]).at[0, 0, 2, 1].set(jnp.nan)
    pruned["dense"]["kernel"] = pruned["dense"]["kernel"].at[3].set(0)
    assert_same_bits(nmjax.unpack(nmjax.pack(pruned, PLAN)), pruned)


SCORES = {"smallest": lambda w: -jnp.abs(w), "largest": lambda w: w, "equal": jnp.ones_like}


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.one_in(3)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", ["2:4", "2:4/kernel", "8:64", "1x4@0.5", "1x4@0.5/layer"])
def test_nonzero_weights_are_packed_whatever_the_plan_ranks_first(pattern, score):
    """A plan's own score may rank zeros above weights."""
    w = RNG.normal(size=(3, 3, 64, 8))
    # One short group and block, and a NaN, which is a weight.
    w[0, 0, :4, 0], w[:, :, 5, :4] = 0, 0
    params = {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.ones(8)}
    plan = nmjax.make_plan(params, pattern, score=SCORES[score])
    pruned = nmjax.prune(params, plan)
    kept = np.argwhere(np.asarray(pruned["kernel"]))[7]
    pruned["kernel"] = pruned["kernel"].at[tuple(kept)].set(jnp.nan)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), pruned)
    replicated = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def pack(tree):
        return nmjax.pack(tree, plan)

    def shard_packed(tree):
        everywhere = jax.tree.map(lambda _: PartitionSpec(), jax.eval_shape(pack, tree))
        return jax.shard_map(
            pack, mesh=replicated, in_specs=PartitionSpec(), out_specs=everywhere, check_vma=False
        )(tree)

    for packing in (pack, jax.jit(pack), shard_packed):
        np.testing.assert_array_equal(nmjax.unpack(packing(pruned))["kernel"], pruned["kernel"])
    np.testing.assert_array_equal(nmjax.unpack(jax.vmap(pack)(stack))["kernel"], stack["kernel"])


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5", "1x4@0.5/layer"])
def test_dense_weights_inside_jit_follow_the_score(pattern):
    params = {"w": PARAMS["dense"]["kernel"]}
    plan = nmjax.make_plan(params, pattern, axes={"w": -2}, score=SCORES["smallest"])
    with pytest.raises(ValueError, match="16 of 32 weights would be dropped"):
        nmjax.pack(params, plan)
    traced = nmjax.unpack(jax.jit(nmjax.pack)(params, plan))
    assert_same_bits(traced, nmjax.prune(params, plan))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fnuz"])
def test_denormal_weights_are_packed_and_counted(dtype):
    tiny = np.array(jnp.finfo(dtype).smallest_subnormal, dtype)
    sparse = np.zeros((8, 4), dtype)
    sparse[2], sparse[3] = tiny, -tiny
    plan = nmjax.make_plan({"w": sparse}, "2:4", axes={"w": -2})
    nmjax.check_sparse({"w": sparse}, plan)
    packed = nmjax.pack({"w": jnp.asarray(sparse)}, plan)
    np.testing.assert_array_equal(bits_of(nmjax.unpack(packed)["w"]), bits_of(sparse))
    # A negative zero is a zero, if the dtype has one, and NaN is not.
    odd = sparse.copy()
    odd[:2] = np.copysign(np.zeros((), dtype), np.array(-1, dtype))
    if np.isnan(odd[0, 0].astype(np.float32)):
        odd[:2] = 0
    nmjax.check_sparse({"w": odd}, plan)
    odd[0] = np.nan
    with pytest.raises(ValueError, match="4 of 8 groups keep more"):
        nmjax.check_sparse({"w": odd}, plan)
    with pytest.raises(ValueError, match="4 of 32 weights would be dropped"):
        nmjax.pack({"w": odd}, plan)


def test_shapes_are_not_packed():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match=r"conv/kernel.*jax\.eval_shape"):
        nmjax.pack(shapes, PLAN)


def test_what_jit_closes_over():
    """`pack` does not look at values there, whether they are known or not."""
    masks = nmjax.compute_masks(PARAMS, PLAN)
    expected = nmjax.prune(PARAMS, PLAN)
    assert_same_bits(nmjax.unpack(jax.jit(lambda: nmjax.pack(PARAMS, PLAN))()), expected)
    packed = jax.jit(lambda params: nmjax.pack(params, PLAN, masks))(PARAMS)
    assert_same_bits(nmjax.unpack(packed), expected)


def test_masks_and_params_that_do_not_fit():
    masks = nmjax.compute_masks(PARAMS, PLAN)
    with pytest.raises(
        ValueError, match="the keys of the masks must be exactly the planned leaves"
    ):
        nmjax.pack(PARAMS, PLAN, {})
    with pytest.raises(TypeError, match="masks are boolean"):
        nmjax.pack(PARAMS, PLAN, {**masks, "dense/kernel": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match="do not fit the plan"):
        nmjax.pack({"dense": PARAMS["dense"]}, PLAN)
    with pytest.raises(ValueError, match="do not fit the plan"):
        nmjax.check_sparse({"dense": PARAMS["dense"]}, PLAN)


def test_check_sparse():
    pruned = nmjax.prune(PARAMS, PLAN)
    nmjax.check_sparse(pruned, PLAN)
    with pytest.raises(ValueError, match=r"call nmjax.prune first") as error:
        nmjax.check_sparse(PARAMS, PLAN)
    assert "conv/kernel (3, 3, 8, 4): 72 of 72 groups keep more than 2:4" in str(error.value)
    assert "dense/kernel (8, 4): 8 of 16 blocks are more than 1x2@0.5" in str(error.value)
    spoilt = jax.tree.map(jnp.array, pruned)
    spoilt["attention"]["out"]["kernel"] = spoilt["attention"]["out"]["kernel"].at[0, :3, 5].set(1)
    with pytest.raises(ValueError, match="attention/out/kernel") as error:
        nmjax.check_sparse(spoilt, PLAN)
    assert "1 of 16 groups" in str(error.value)
    assert "conv" not in str(error.value)


def test_pruning_a_packed_tree_says_so():
    params = {"layer": {"kernel": jnp.ones((8, 4))}}
    plan = nmjax.make_plan(params, "2:4")
    with pytest.raises(ValueError, match=r"layer/kernel.*packed weight, call nmjax\.unpack"):
        nmjax.prune(prune_and_pack(params, plan), plan)

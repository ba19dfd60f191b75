"""Packed strided groups: the arrays of the weight whose inputs are permuted, and exact products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax import NM, LeafPlan
from nmjax.files.interchange import to_semi_structured
from nmjax.packed.nm import PackedNM
from nmjax.patterns.pattern import parse_pattern
from nmjax.pruning import leaf_mask
from tests.nmjax.float_bits import bits_of
from tests.nmjax.masks.test_nm import with_ties
from tests.nmjax.masks.test_strided import member_order

RNG = np.random.default_rng(0)


# A bitmask, and positions of two bits and of four.
@pytest.mark.parametrize(("n", "m", "stride", "runs"), [(3, 6, 2, 3), (2, 4, 8, 2), (1, 16, 3, 1)])
def test_packing_is_that_of_the_permuted_weight(n, m, stride, runs):
    shape = (2, runs * m * stride, 3)
    w = with_ties(RNG, shape)
    strided, consecutive = (
        LeafPlan(pattern, (-2,), (-1,), shape) for pattern in (NM(n, m, stride=stride), NM(n, m))
    )
    order = np.array(member_order(shape[1], m, stride))
    mask = leaf_mask(w, strided, nmjax.magnitude)
    packed = PackedNM.pack(w, mask, strided)
    permuted = PackedNM.pack(w[:, order], mask[:, order], consecutive)
    np.testing.assert_array_equal(bits_of(packed.values), bits_of(permuted.values))
    np.testing.assert_array_equal(packed.codes, permuted.codes)
    np.testing.assert_array_equal(packed.positions(), permuted.positions())
    unpacked = packed.unpack()
    np.testing.assert_array_equal(bits_of(unpacked), bits_of(jnp.where(mask, w, 0)))
    jax.tree.map(np.asarray, packed).check()
    assert PackedNM.misfits(unpacked != 0, strided)[0] == 0


@pytest.fixture(scope="module")
def layer():
    """A pruned matrix (64, 32) of 1:4/8, its plan, and its packed form."""
    params = {"kernel": jnp.asarray(RNG.standard_normal((64, 32)), "float32")}
    plan = nmjax.make_plan(params, "1:4/8")
    pruned = nmjax.prune(params, plan)
    return pruned["kernel"], plan, nmjax.pack(pruned, plan)["kernel"]


@pytest.mark.parametrize("implementation", [None, "ffi", "xla"])
def test_products(layer, implementation):
    w, _, packed = layer
    x = jnp.asarray(RNG.standard_normal((3, 64)), "float32")
    if implementation == "ffi" and not nmjax.backends()["ffi"].startswith("ready"):
        pytest.skip("no compiled kernels")

    def loss(x, packed):
        return (nmjax.packed_matmul(x, packed, implementation=implementation) ** 2).sum()

    y = nmjax.packed_matmul(x, packed, implementation=implementation)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    dx, dpacked = jax.grad(loss, (0, 1), allow_int=True)(x, packed)
    expected_dx, dw = jax.grad(lambda x, w: ((x @ w) ** 2).sum(), (0, 1))(x, w)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-4)
    # The gradient of a kept value is the gradient at its place.
    np.testing.assert_allclose(
        packed.with_values(dpacked.values).unpack(), jnp.where(w != 0, dw, 0), rtol=1e-4, atol=1e-4
    )


def test_convolutions():
    params = {
        "kernel": jnp.asarray(RNG.standard_normal((3, 3, 16, 8)), "float32"),
        "bias": jnp.zeros(8),
    }
    plan = nmjax.make_plan(params, "2:4/4")
    pruned = nmjax.prune(params, plan)["kernel"]
    images = jnp.asarray(RNG.standard_normal((1, 5, 5, 16)), "float32")
    expected = jax.lax.conv_general_dilated(
        images, pruned, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    packed = nmjax.pack({**params, "kernel": pruned}, plan)["kernel"]
    np.testing.assert_allclose(nmjax.packed_conv(images, packed), expected, rtol=1e-4, atol=1e-4)


def test_shards_of_whole_runs_multiply_and_others_are_refused(layer):
    w, _, packed = layer
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,))
    x = jnp.asarray(RNG.standard_normal((2, 64)), "float32")
    specs = jax.tree.unflatten(jax.tree.structure(packed), [P("model"), P("model")])
    product = jax.shard_map(
        lambda x, packed: jax.lax.psum(nmjax.packed_matmul(x, packed), "model"),
        mesh=mesh,
        in_specs=(P(None, "model"), specs),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_allclose(product(x, packed), x @ w, rtol=1e-5, atol=1e-5)
    cut = jax.tree.map(lambda array: array[: len(array) // 4], packed)
    with pytest.raises(ValueError, match=r"a shard of 4 of the 16 groups.* cuts a run of 8 groups"):
        cut.check_arrays()


def test_the_contract(layer, tmp_path):
    w, plan, packed = layer
    assert parse_pattern("1:4/8") == plan["kernel"].pattern
    assert "1:4/8" in str(plan)
    nmjax.check_sparse({"kernel": w}, plan)
    with pytest.raises(ValueError, match="groups keep more than 1:4/8"):
        nmjax.check_sparse({"kernel": w + 1}, plan)
    # Consecutive 1:4 is another pattern: each plan refuses what the other one pruned.
    with pytest.raises(ValueError, match="groups keep more than 1:4"):
        nmjax.check_sparse({"kernel": w}, nmjax.make_plan({"kernel": w}, "1:4"))
    path = tmp_path / "strided.safetensors"
    nmjax.save_packed(path, {"kernel": packed})
    loaded = nmjax.load_packed(path)["kernel"]
    assert loaded.leaf_plan == packed.leaf_plan
    np.testing.assert_array_equal(loaded.unpack(), w)
    with pytest.raises(ValueError, match=r"kernel.*\(48, 32\).*48 inputs are not .* 64 = 4 \* 16"):
        nmjax.make_plan({"kernel": jnp.ones((48, 32))}, "2:4/16")


def test_training_flows(layer):
    w, plan, _ = layer
    params = {"kernel": w + 0.01}
    masks = nmjax.compute_masks(params, plan)
    np.testing.assert_array_equal(masks["kernel"], nmjax.nm_mask(w + 0.01, 1, 4, stride=8))
    gradient = jax.grad(lambda p: nmjax.sparsify(p, plan)["kernel"].sum())(params)["kernel"]
    np.testing.assert_array_equal(gradient, np.ones(w.shape))
    term = nmjax.add_sparse_refined(plan, 0.5)
    updates, _ = term.update(jax.tree.map(jnp.zeros_like, params), term.init(params), params)
    expected = jnp.where(masks["kernel"], 0, 0.5 * params["kernel"])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    assert int(nmjax.total_sad(masks, nmjax.compute_masks({"kernel": w[::-1]}, plan))) > 0


def test_exports_that_need_consecutive_groups_refuse():
    params = {"kernel": jnp.asarray(RNG.standard_normal((64, 32)), "bfloat16")}
    plan = nmjax.make_plan(params, "2:4/16")
    packed = nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]
    with pytest.raises(ValueError, match=r'semi-structured.* 2:4/16 lie 16 apart; plan "2:4"'):
        to_semi_structured(packed)
    with pytest.raises(NotImplementedError, match='implementation="decode" cannot'):
        nmjax.packed_matmul(jnp.ones((1, 64), "bfloat16"), packed, implementation="decode")


def test_a_program_must_keep_runs_together():
    params = {"kernel": jnp.zeros((64, 8))}

    def halves(params, x):  # Each half of the inputs holds two runs of 16, and half a run of 64.
        return x @ params["kernel"][:32] + x @ params["kernel"][32:]

    def plan(pattern):
        return nmjax.make_plan(params, pattern, forward=halves, inputs=(jnp.ones((2, 32)),))

    assert "kernel" in plan("2:4/4")
    with pytest.raises(ValueError, match="breaks its groups of 4 with stride 16"):
        plan("2:4/16")

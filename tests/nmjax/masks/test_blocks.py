"""Masks of blocks against a brute force that spells the rule out."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nmjax.layouts import Axes
from nmjax.masks.blocks import block_mask, split_blocks, spread_blocks
from nmjax.patterns import Block1xN

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]
NORMS = {"l1": 1, "l2": 2}


def entries_of_blocks(shape, n, axes):
    """(row, input) -> flat indices of the block's weights, for each weight of the stack."""
    blocks = {}
    for position in np.ndindex(shape):
        at = {axis - len(shape): i for axis, i in enumerate(position)}
        output = inputs = 0
        for axis in axes.output:
            output = output * shape[axis] + at[axis]
        for axis in axes.reduction:
            inputs = inputs * shape[axis] + at[axis]
        named = (*axes.output, *axes.reduction, *axes.taps)
        layer = tuple(i for axis, i in at.items() if axis not in named)
        blocks.setdefault(layer, {}).setdefault((output // n, inputs), []).append(position)
    return blocks


def brute_force(w, n, sparsity, axes, order, uniform):
    """Drops, of each row or of each layer, the blocks of lowest norm; ties drop the later."""
    w = np.asarray(w, np.float64)
    mask = np.ones(w.shape, bool)
    for blocks in entries_of_blocks(w.shape, n, axes).values():
        rows = {row for row, _ in blocks}
        for competing in [[row] for row in rows] if uniform else [rows]:
            names = [block for block in blocks if block[0] in competing]
            norm = {b: np.linalg.norm([w[p] for p in blocks[b]], order) for b in names}
            ranking = sorted(names, key=lambda b, norm=norm: (-round(norm[b], 9), b))
            dropped = math.floor(sparsity * len(names))
            for block in ranking[len(names) - dropped :]:
                for position in blocks[block]:
                    mask[position] = False
    return mask


@st.composite
def cases(draw):
    """Weights in any layout: which axes are stack, outputs, inputs and taps is drawn too."""
    n = draw(st.sampled_from([1, 2, 3, 4]))
    more = st.lists(st.sampled_from(["output", "reduction", "taps", "stack"]), max_size=3)
    roles = draw(st.permutations(["output", "reduction", *draw(more)]))
    shape = [draw(st.integers(1, 3)) for _ in roles]
    outputs = draw(st.permutations([i for i, role in enumerate(roles) if role == "output"]))
    shape[outputs[-1]] *= n
    named = {
        role: tuple(i - len(roles) for i, r in enumerate(roles) if r == role)
        for role in ("reduction", "taps")
    }
    axes = Axes(named["reduction"], tuple(i - len(roles) for i in outputs), named["taps"])
    # Few different values: equal blocks are what goes wrong.
    values = draw(st.integers(0, 2**32 - 1))
    w = np.random.default_rng(values).integers(-2, 3, shape)
    sparsity = draw(st.sampled_from([0, 0.2, 0.3, 0.5, 2 / 3, 0.9]))
    return w.astype(jnp.dtype(draw(st.sampled_from(DTYPES)))), n, sparsity, axes


def mask_of(w, n, sparsity, axes, score="l1", **options):
    return block_mask(
        w,
        n,
        sparsity,
        score,
        reduction_axes=axes.reduction,
        output_axes=axes.output,
        tap_axes=axes.taps,
        **options,
    )


@given(cases(), st.sampled_from(["l1", "l2"]), st.booleans())
def test_equals_brute_force(case, score, uniform):
    w, n, sparsity, axes = case
    mask = mask_of(w, n, sparsity, axes, score, uniform=uniform)
    assert mask.dtype == jnp.bool_
    expected = brute_force(w, n, sparsity, axes, NORMS[score], uniform)
    np.testing.assert_array_equal(mask, expected)


@functools.partial(jax.jit, static_argnums=(1, 2))
def there_and_back(w, n, axes):
    """A number for each block, those numbers in the shape of `w`, and cut into blocks again."""
    shape = split_blocks(w, n, axes).shape
    numbers = jnp.arange(math.prod(shape[:-1])).reshape(shape[:-1])
    spread = spread_blocks(numbers, w.shape, n, axes)
    return numbers, spread, split_blocks(spread, n, axes)


@given(cases())
def test_blocks_there_and_back(case):
    w, n, _, axes = case
    numbers, spread, blocks = map(np.asarray, there_and_back(w, n, axes))
    assert spread.shape == w.shape
    assert blocks.size == w.size
    np.testing.assert_array_equal(blocks, np.broadcast_to(numbers[..., None], blocks.shape))


KERNEL = jax.random.normal(jax.random.key(0), (3, 3, 10, 32))


@pytest.mark.parametrize("score", ["l1", "l2", "bpar"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, 0.99])
def test_every_row_keeps_the_same_number_of_whole_blocks(score, sparsity):
    mask = np.asarray(block_mask(KERNEL, 8, sparsity, score))
    rows = mask.reshape(9, 10, 4, 8)
    assert (rows == rows[:1, :, :, :1]).all()
    kept = 10 - math.floor(sparsity * 10)
    np.testing.assert_array_equal(rows[0, :, :, 0].sum(axis=0), kept)
    pattern = Block1xN(8, sparsity)
    assert mask.sum() == 9 * pattern.kept(10, 32)


@pytest.mark.parametrize("sparsity", [0.3, 0.55])
def test_a_layer_keeps_so_many_and_rows_differ(sparsity):
    mask = np.asarray(block_mask(KERNEL, 8, sparsity, uniform=False))
    kept = mask.reshape(9, 10, 4, 8)[0, :, :, 0]
    assert kept.sum() == 40 - math.floor(sparsity * 40)
    assert len(set(kept.sum(axis=0).tolist())) > 1


def test_of_equal_blocks_the_lower_input_and_then_the_lower_row_stay():
    w = jnp.ones((4, 6))
    kept = np.asarray(block_mask(w, 2, 0.5))[:, ::2]
    assert kept.tolist() == [[True] * 3, [True] * 3, [False] * 3, [False] * 3]
    kept = np.asarray(block_mask(w, 2, 0.5, uniform=False))[:, ::2].T
    assert kept.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


@pytest.mark.not_under("jax_debug_nans")
def test_nan_stays_visible():
    w = KERNEL.at[1, 1, 7, 3].set(jnp.nan) * 1e-6
    for score in ("l1", "l2"):
        assert block_mask(w, 8, 0.9, score)[:, :, 7, :8].all()


@pytest.mark.parametrize("uniform", [True, False])
def test_the_number_kept_may_be_traced(uniform):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def masked(kept):
        return block_mask(KERNEL, 8, 0.5, uniform=uniform, kept=kept)

    for kept in range(11):
        blocks = np.asarray(masked(kept)).reshape(9, 10, 4, 8)[0, :, :, 0]
        np.testing.assert_array_equal(blocks.sum(axis=0) if uniform else blocks.sum(), kept)
        sparsity = 1 - (kept - 0.5) / (10 if uniform else 40)  # floor leaves `kept`
        if 0 <= sparsity < 1:
            expected = block_mask(KERNEL, 8, sparsity, uniform=uniform)
            np.testing.assert_array_equal(masked(kept), expected)


def test_a_score_of_ones_own():
    def first_weight(blocks):
        return blocks[..., 0]

    mask = np.asarray(block_mask(KERNEL, 8, 0.5, first_weight)).reshape(9, 10, 4, 8)[0, :, :, 0]
    values = np.asarray(KERNEL)[0, 0].reshape(10, 4, 8)[:, :, 0]
    np.testing.assert_array_equal(mask, values >= np.sort(values, axis=0)[5])


@pytest.mark.parametrize("score", ["l1", "bpar"])
def test_jit_vmap_and_no_gradient(score):
    stack = jax.random.normal(jax.random.key(1), (3, 12, 8))

    def masked(w):
        return block_mask(w, 4, 0.4, score, tap_axes=())

    each = [masked(w) for w in stack]
    np.testing.assert_array_equal(masked(stack), each)  # An axis that is not named is a stack.
    np.testing.assert_array_equal(jax.vmap(masked)(stack), each)
    np.testing.assert_array_equal(jax.jit(masked)(stack), each)
    gradient = jax.grad(lambda w: jnp.sum(jnp.where(masked(w), w, 0)))(stack[0])
    np.testing.assert_array_equal(gradient, each[0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()], ids=str)
@pytest.mark.parametrize(("score", "uniform"), [("l1", True), ("l1", False), ("bpar", True)])
def test_eight_devices_mask_as_one(axis_type, spec, score, uniform):
    w = jax.random.normal(jax.random.key(2), (16, 64))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, spec))
        mask = jax.jit(lambda w: block_mask(w, 4, 0.5, score, uniform=uniform))(sharded)
    alone = block_mask(w, 4, 0.5, score, uniform=uniform)
    np.testing.assert_array_equal(jax.device_get(mask), alone)


@pytest.mark.optimized
def test_no_communication_where_shards_hold_whole_rows():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    w = jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, P(None, "d")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda w: block_mask(w, 4, 0.5)).lower(w).compile()
    assert not [word for word in ("all-", "collective") if word in compiled.as_text()]


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 3, 4, 8)])
@pytest.mark.parametrize("score", ["l1", "bpar"])
def test_no_weights(shape, score):
    assert block_mask(jnp.zeros(shape), 4, 0.5, score).shape == shape


W = jnp.ones((8, 6))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((W, 4, 0.5), {}, ValueError, r"blocks of 4 .*\(8, 6\) have 6 along .*\(-1,\)"),
        ((W, 0, 0.5), {}, ValueError, "n >= 1 output channels, got n=0"),
        ((W, 2.0, 0.5), {}, TypeError, "n must be a Python integer"),
        ((W, 2, 1.0), {}, ValueError, "0 <= sparsity < 1, got 1.0"),
        ((W, 2, 50), {}, ValueError, "did you mean 0.5"),
        ((W, 2, "half"), {}, TypeError, "sparsity must be a Python number"),
        ((W, 2, 0.5, "l3"), {}, ValueError, "l1, l2, bpar"),
        ((W, 2, 0.5, lambda b: b), {}, ValueError, "one number per block"),
        ((W.astype(int), 2, 0.5), {}, TypeError, "weights must be real floating"),
        ((W, 2, 0.5, lambda b: b[..., 0] > 0), {}, TypeError, "scores must be real floating"),
        ((W, 2, 0.5), {"output_axes": 2}, ValueError, "the weight has 2 axes"),
        ((W, 2, 0.5), {"output_axes": -2}, ValueError, "given twice"),
        ((W, 2, 0.5), {"reduction_axes": ()}, TypeError, "one or more integers"),
        ((W, 2, 0.5), {"tap_axes": 1.5}, TypeError, "one or more integers"),
        ((W, 2, 0.5), {"uniform": 1}, TypeError, "uniform must be True or False"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        block_mask(*arguments, **options)


def test_explicit_shards_that_cut_blocks():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P(None, "d")))
        with pytest.raises(
            ValueError, match=r"blocks of 4 along axes \(-1,\).*cross shard boundaries"
        ):
            block_mask(w, 4, 0.5)

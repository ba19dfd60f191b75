"""A pattern that nmjax does not know, defined in one file, goes everywhere that patterns go."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax.packed.weight import Packed
from nmjax.patterns import Pattern, Whole
from tests.nmjax.packed_weights import prune_and_pack


@dataclasses.dataclass(frozen=True)
class EverySecond(Pattern):
    """Of every two inputs, all outputs keep the one with the larger sum of magnitudes."""

    syntax: ClassVar[str] = '"every second"'

    @classmethod
    def parse(cls, text):
        return cls() if text == "every second" else None

    @property
    def density(self):
        return 0.5

    def kept(self, inputs, outputs):
        return inputs * outputs // 2

    def misfit(self, inputs, outputs):
        return f"{inputs} inputs are odd" if inputs % 2 else None

    def mask(self, w, axes, score):
        (inputs,) = axes.reduction
        others = tuple(axis for axis in range(-w.ndim, 0) if axis != inputs)
        sums = score(w).sum(axis=others).reshape(-1, 2)
        kept = jnp.stack([sums[:, 0] >= sums[:, 1], sums[:, 0] < sums[:, 1]], axis=1).ravel()
        shape = [w.shape[axis] if axis == inputs else 1 for axis in range(-w.ndim, 0)]
        return jnp.broadcast_to(kept.reshape(shape), w.shape)

    def wholes(self, shape, axes):
        return [Whole(axes.reduction, 2, "pairs of inputs")]

    def __str__(self):
        return "every second"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "odd"], meta_fields=["leaf_plan"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedEverySecond(Packed, pattern=EverySecond):
    """The kept rows (pairs, outputs), and whether each is the second of its pair."""

    excess: ClassVar[str] = "pairs keep more than"

    values: jax.Array
    odd: jax.Array
    leaf_plan: nmjax.LeafPlan

    @classmethod
    def pack(cls, w, mask, leaf_plan):
        pairs, kept = (x.reshape(-1, 2, x.shape[-1]) for x in (w, mask))
        odd = kept[:, 1].any(axis=-1)
        return cls(jnp.where(odd[:, None], pairs[:, 1], pairs[:, 0]), odd, leaf_plan)

    def unpack(self):
        zeros = jnp.zeros_like(self.values)
        odd = self.odd[:, None]
        pairs = [jnp.where(odd, zeros, self.values), jnp.where(odd, self.values, zeros)]
        return jnp.stack(pairs, axis=1).reshape(-1, self.values.shape[-1])

    @classmethod
    def misfits(cls, kept, leaf_plan):
        rows = kept.any(axis=-1).reshape(-1, 2)
        return int(rows.all(axis=-1).sum()), len(rows)

    def check(self):
        if self.odd.shape != self.values.shape[:1]:
            raise ValueError("not one flag for each row")

    @property
    def least_nbytes(self):
        return self.values.nbytes + len(self.odd) // 8

    @property
    def leading(self):
        return self.values.shape[:-2]


W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
PARAMS = {"layer": {"kernel": W, "bias": jnp.zeros(16)}}


def by_hand(w):
    """The rows of each pair with the smaller sum, set to zero."""
    w = np.array(w)
    for first in range(0, len(w), 2):
        a, b = np.abs(w[first : first + 2]).sum(axis=1)
        w[first + (a >= b)] = 0
    return w


@pytest.fixture
def plan():
    return nmjax.make_plan(PARAMS, "every second")


def test_it_parses_and_plans(plan):
    assert nmjax.parse_pattern("every second") == EverySecond()
    assert plan["layer/kernel"].pattern == EverySecond()
    assert plan["layer/kernel"].kept == 64
    assert "every second" in str(plan)
    with pytest.raises(ValueError, match='or "every second"'):
        nmjax.parse_pattern("every third")
    with pytest.raises(ValueError, match="7 inputs are odd"):
        nmjax.make_plan({"kernel": jnp.ones((7, 4))}, "every second")


def test_masks_training_and_the_optimizer(plan):
    np.testing.assert_array_equal(nmjax.prune(PARAMS, plan)["layer"]["kernel"], by_hand(W))
    sparse, pull = jax.vjp(lambda params: nmjax.sparsify(params, plan), PARAMS)
    np.testing.assert_array_equal(sparse["layer"]["kernel"], by_hand(W))
    (gradient,) = pull(sparse)
    np.testing.assert_array_equal(gradient["layer"]["kernel"], by_hand(W))
    tx = optax.chain(nmjax.add_sparse_refined(plan, 0.5))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layer"]["kernel"], 0.5 * (W - by_hand(W)))


def test_packing_files_and_sizes(plan, tmp_path):
    with pytest.raises(ValueError, match="4 of 4 pairs keep more than every second"):
        nmjax.check_sparse(PARAMS, plan)
    packed = prune_and_pack(PARAMS, plan)
    leaf = packed["layer"]["kernel"]
    assert type(leaf) is PackedEverySecond
    assert (leaf.shape, leaf.inputs, leaf.outputs, leaf.density) == ((8, 16), 8, 16, 0.5)
    np.testing.assert_array_equal(nmjax.unpack(packed)["layer"]["kernel"], by_hand(W))
    assert nmjax.sizes(packed).leaves["layer/kernel"].packed == 4 * 64 + 4
    nmjax.save_packed(tmp_path / "file.safetensors", packed)
    loaded = nmjax.load_packed(tmp_path / "file.safetensors")["layer"]["kernel"]
    assert type(loaded) is PackedEverySecond
    np.testing.assert_array_equal(loaded.unpack(), by_hand(W))


def test_products(plan):
    packed = prune_and_pack(PARAMS, plan)["layer"]["kernel"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    expected = np.maximum(np.asarray(x, np.float64) @ by_hand(W) + 1, 0)
    for implementation in (None, "xla"):
        y = nmjax.packed_matmul(
            x, packed, jnp.ones(16), activation="relu", implementation=implementation
        )
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for implementation in ("ffi", "gather", "decode", "cusparselt"):
        with pytest.raises(NotImplementedError, match=r"\(8, 16\)"):
            nmjax.packed_matmul(x, packed, implementation=implementation)


def test_shards_that_cut_pairs_are_named(plan):
    mesh = jax.make_mesh((8,), ("model",), devices=jax.devices()[:8])
    shardings = {"layer": {"kernel": jax.sharding.PartitionSpec("model")}}
    with pytest.raises(ValueError, match="cuts pairs of inputs"):
        nmjax.check_sharding(PARAMS, plan, shardings, mesh=mesh)


def test_a_pattern_without_a_packed_form_says_so():
    @dataclasses.dataclass(frozen=True)
    class Unpackable(EverySecond):
        @classmethod
        def parse(cls, text):
            return None

    plan = nmjax.make_plan(PARAMS, Unpackable())
    with pytest.raises(TypeError, match="have no packed form"):
        prune_and_pack(PARAMS, plan)

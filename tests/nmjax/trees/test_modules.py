"""The functions for trees of parameters refuse Flax modules, and take everything else."""

import equinox
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import nmjax
import nmjax.linen
import nmjax.nnx
from nmjax.trees.modules import check_no_module


class Own(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))


def plan():
    return nmjax.make_plan(nnx.state(Own(), nnx.Param), "2:4")


DOORS = {
    "make_plan": lambda model: nmjax.make_plan(model, "2:4"),
    "compute_masks": lambda model: nmjax.compute_masks(model, plan()),
    "sparsify": lambda model: nmjax.sparsify(model, plan()),
    "prune": lambda model: nmjax.prune(model, plan()),
    "pack": lambda model: nmjax.pack(model, plan()),
    "check_sparse": lambda model: nmjax.check_sparse(model, plan()),
}


@pytest.mark.parametrize("door", DOORS)
def test_nnx_modules_are_refused(door):
    with pytest.raises(TypeError, match=r"NNX module Own.*nmjax\.nnx\.sparsify"):
        DOORS[door](Own())
    with pytest.raises(TypeError, match="NNX module Linear"):
        DOORS[door](nnx.Linear(16, 8, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("door", DOORS)
def test_linen_modules_are_refused(door):
    with pytest.raises(TypeError, match=r"linen module Dense\..*nmjax\.linen\.sparsify"):
        DOORS[door](linen.Dense(8))


def test_inside_a_loss():
    """Statistics and random streams of the module would stand still."""
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    known = nmjax.make_plan(nnx.state(model, nnx.Param), "2:4")
    with pytest.raises(TypeError, match=r"nmjax\.nnx"):
        nnx.grad(lambda model: nmjax.sparsify(model, known)(jnp.ones((1, 16))).sum())(model)


def test_everything_else_passes():
    class Module:
        """Another class of this name."""

    state = nnx.state(Own(), nnx.Param)
    params = linen.Dense(8).init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    equinox_model = equinox.nn.Linear(16, 8, key=jax.random.key(0))
    others = Module(), {"a": {"kernel": 1}}, [1]
    for tree in (equinox_model, state, nnx.to_pure_dict(state), params, *others):
        check_no_module(tree)


def test_modules_of_the_other_library_are_named_with_their_functions():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"NNX module Linear\..*nmjax\.nnx\.pack") as caught:
        nmjax.linen.packed_apply(model)
    assert "Array" not in str(caught.value)
    with pytest.raises(TypeError, match=r"linen module Dense\..*nmjax\.linen\.packed_apply"):
        nmjax.nnx.pack(linen.Dense(4), {})
    with pytest.raises(TypeError, match=r"expected a linen module instance .* got the class Dense"):
        nmjax.linen.packed_apply(linen.Dense)

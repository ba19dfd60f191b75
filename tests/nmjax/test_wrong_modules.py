"""Wrong arguments of `nmjax.linen` and `nmjax.nnx`: the error shows the right call, no weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from nmjax import linen

X = jnp.ones((2, 8))
LINEN = nn.Dense(4)
NNX = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
PARAMS = LINEN.init(jax.random.key(0), X)["params"]
PLAN = linen.make_plan(LINEN, "2:4", X)
PACKED = nmjax.pack(nmjax.prune(PARAMS, PLAN), PLAN)


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: linen.make_plan(PARAMS, "2:4", X), 'dict; .* nmjax.make_plan(params, "2:4")'),
        (lambda: linen.make_plan(NNX, "2:4", X), "NNX module Linear. Use nmjax.nnx:"),
        (lambda: linen.make_plan(nn.Dense, "2:4", X), "the class Dense; pass an instance"),
        (lambda: linen.make_plan(LINEN, X, "2:4"), "swap the arguments"),
        (lambda: linen.cost(PLAN, LINEN, X), "got Plan; write nmjax.linen.cost(module, plan, x)"),
        (lambda: linen.sparsify(NNX, "2:4"), "NNX module Linear. Use nmjax.nnx:"),
        (lambda: linen.packed_apply(NNX), "NNX module Linear. Use nmjax.nnx:"),
        (lambda: linen.packed_apply(LINEN)(PACKED, X), 'pass {"params": packed}'),
        (lambda: linen.fold_batch_norm(PARAMS, LINEN, X), "write nmjax.linen.fold_batch_norm("),
        (lambda: nmjax.nnx.make_plan(LINEN, "2:4", (X,)), "linen module Dense. Use nmjax.linen:"),
        (lambda: nmjax.nnx.make_plan(PARAMS, "2:4", (X,)), 'nmjax.make_plan(params, "2:4")'),
        (lambda: nmjax.nnx.make_plan("2:4", NNX, (X,)), "got str; write nmjax.nnx.make_plan("),
        (lambda: nmjax.nnx.cost(PLAN, NNX, X), "got Plan; write nmjax.nnx.cost(model, plan, x)"),
        (lambda: nmjax.nnx.save(NNX, "f"), "got str; write nmjax.nnx.save(path, model)"),
        (lambda: nmjax.nnx.load("f", nnx.Linear), "the class Linear; pass an instance"),
        (lambda: nmjax.nnx.load(NNX, "f"), "got str; write nmjax.nnx.load(path, model)"),
        (lambda: nmjax.nnx.prune(PLAN, NNX), "got Plan; write nmjax.nnx.prune(model, plan)"),
        (lambda: nmjax.nnx.pack(PLAN, NNX), "got Plan; write nmjax.nnx.pack(model, plan)"),
        (lambda: nmjax.nnx.sparsify(PLAN, NNX), "write nmjax.nnx.sparsify(model, plan)"),
    ],
)
def test_the_right_call_is_named(call, advice):
    with pytest.raises(TypeError) as caught:
        call()
    for part in advice.split(" .* "):
        assert part in str(caught.value)
    assert "Array(" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_within_their_collection_run():
    linen.packed_apply(LINEN)({"params": PACKED}, X)
    linen.packed_apply(nn.Sequential([nn.relu]))({}, X)


def test_a_sparse_term_without_the_frozen_weights_is_explained():
    layer = nnx.LoRA(8, 2, 4, base_module=NNX, rngs=nnx.Rngs(1))
    tx = optax.chain(
        nmjax.add_sparse_refined(nmjax.nnx.make_plan(layer, "2:4", (X,))), optax.sgd(0.1)
    )
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.LoRAParam)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda layer: layer(X).sum(), argnums=wrt)(layer)
    with pytest.raises(ValueError, match="frozen, leave add_sparse_refined out of the optimizer"):
        optimizer.update(layer, grads)
    with pytest.raises(ValueError, match="do not fit the plan") as caught:
        nmjax.add_sparse_refined(PLAN).update(PARAMS, optax.EmptyState(), {"kernel": X})
    assert "frozen" not in str(caught.value)


@pytest.mark.parametrize("function", [nmjax.nnx.make_plan, nmjax.nnx.cost])
def test_token_ids_given_as_a_shape_are_explained(function):
    shape = ((1, 5),) if function is nmjax.nnx.cost else (((1, 5),),)
    with pytest.raises(ValueError, match="integer") as caught:
        function(nnx.Embed(8, 4, rngs=nnx.Rngs(0)), "2:4", *shape)
    assert "pass jax.ShapeDtypeStruct(shape, jnp.int32)" in "".join(caught.value.__notes__)

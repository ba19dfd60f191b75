"""Plans of linen modules: read off the module's program, from shapes, for every kind of input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import nmjax
from nmjax import linen

KEY = jax.random.key(0)


class OutIn(nn.Module):
    """A layer that stores its kernel as (out, in), under a name that says otherwise."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = self.features, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(), shape, jnp.float32)
        return x @ kernel.T


class Network(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask=None, *, train):
        x = nn.Embed(32, 8)(tokens)
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1)(
            x, mask=mask, deterministic=not train
        )
        x = nn.BatchNorm(use_running_average=not train)(OutIn(16)(x))
        self.sow("intermediates", "normed", x)
        return nn.DenseGeneral((4, 6), use_bias=False, name="heads")(x)


TOKENS = jnp.zeros((2, 5), jnp.int32)
AXES = {
    "MultiHeadDotProductAttention_0/key/kernel": (-3,),
    "MultiHeadDotProductAttention_0/out/kernel": (-3, -2),
    "MultiHeadDotProductAttention_0/query/kernel": (-3,),
    "MultiHeadDotProductAttention_0/value/kernel": (-3,),
    "OutIn_0/kernel": (-1,),
    "heads/kernel": (-3,),
}


@pytest.mark.parametrize("train", [False, True])
def test_the_plan_is_the_one_made_from_the_forward_pass(train):
    plan = linen.make_plan(Network(), "2:4", TOKENS, call={"train": train}, exclude="query")
    module, rngs = Network(), {"dropout": KEY}
    variables = module.init(KEY, TOKENS, train=False)
    params, others = variables["params"], {"batch_stats": variables["batch_stats"]}

    def forward(params, tokens):
        variables = {"params": params, **others}
        return module.apply(variables, tokens, train=train, rngs=rngs, mutable=list(others))[0]

    same = nmjax.make_plan(params, "2:4", forward=forward, inputs=(TOKENS,), exclude="query")
    assert plan == same
    assert str(plan) == str(same)
    expected = {name: axes for name, axes in AXES.items() if "query" not in name}
    assert {name: leaf.reduction_axes for name, leaf in plan.items()} == expected
    assert {leaf.source for leaf in plan.values()} == {"program"}
    assert plan.dense["Embed_0/embedding"].startswith("embedding")


def test_inputs_are_arrays_or_shapes():
    arrays = (TOKENS, jnp.ones((2, 1, 5, 5), bool))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    plan = linen.make_plan(Network(), "2:4", *arrays, call={"train": False})
    assert plan == linen.make_plan(Network(), "2:4", *shapes, call={"train": False})
    by_name = linen.make_plan(Network(), "2:4", arrays[0], call={"train": False, "mask": arrays[1]})
    assert plan == by_name
    assert linen.make_plan(OutIn(4), "2:4", (1, 8)) == linen.make_plan(
        OutIn(4), "2:4", jnp.zeros((1, 8))
    )


def test_nothing_is_computed():
    plan = linen.make_plan(nn.Dense(2**20), "2:4", (2**20, 2**20))  # Arrays of 4 TB.
    assert plan["kernel"].shape == (2**20, 2**20)


def test_boxed_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    plan = linen.make_plan(nn.Dense(4, kernel_init=init), "2:4", (1, 8))
    assert plan == linen.make_plan(nn.Dense(4), "2:4", (1, 8))


def test_layers_stacked_on_any_axis():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return OutIn(8)(nn.Dense(8)(x)), None

    for axis in (0, 1):
        stack = nn.scan(
            Layer, length=4, variable_axes={"params": axis}, split_rngs={"params": True}
        )
        plan = linen.make_plan(stack(), "2:4", (2, 8))
        # Stacked on axis 1, a kernel is (in, layers, out).
        expected = {"Dense_0/kernel": (-2 - axis,), "OutIn_0/kernel": (-1,)}
        assert {name: leaf.reduction_axes for name, leaf in plan.items()} == expected


@pytest.mark.parametrize("train", [False, True])
def test_running_statistics_scale_a_weight(train):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.SpectralNorm(OutIn(4))(x, update_stats=train)

    plan = linen.make_plan(Normed(), "2:4", (1, 8), call={"train": train})
    assert {name: leaf.reduction_axes for name, leaf in plan.items()} == {"OutIn_0/kernel": (-1,)}


def test_what_is_no_module():
    with pytest.raises(TypeError, match="expected a linen module instance"):
        linen.make_plan(nn.Dense, "2:4", (1, 8))


def test_a_module_without_inputs():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self):
            return nn.Dense(4)(jnp.ones((1, 8)))

    with pytest.raises(ValueError, match="inputs are needed"):
        linen.make_plan(Constant(), "2:4")


def test_cost_of_a_pattern_plans_along_the_axes_of_the_program():
    # Along its other axis, of size 3, the kernel does not divide into groups.
    assert linen.cost(OutIn(3), "2:4", (1, 8)).leaves["kernel"].macs_kept == 12


def test_random_keys_among_the_variables():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            key = self.variable("noise", "key", lambda: jax.random.key(0)).value
            return nn.Dense(8)(x + jax.random.normal(key, x.shape))

    plan = linen.make_plan(Noisy(), "2:4", (1, 16))
    assert plan["Dense_0/kernel"].reduction_axes == (-2,)

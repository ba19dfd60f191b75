"""Plans of NNX modules, whose axes no name or shape would show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nmjax
import nmjax.nnx


class Network(nnx.Module):
    """Layers that names and shapes leave unknown, and states that are not parameters."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.project = nnx.Einsum("btd,dnh->btnh", (16, 4, 8), rngs=rngs)
        self.back = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 16, (3,), transpose_kernel=True, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens, scale=1.0):
        x = self.back(self.project(self.embed(tokens)))
        return self.head(self.dropout(self.norm(self.up(x)))) * scale


TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
AXES = {
    "back/kernel": (-3, -2),
    "head/kernel": (-2,),
    "project/kernel": (-3,),
    "up/kernel": (-1,),
}


@pytest.mark.parametrize("train", [True, False])
def test_axes_are_read_off_the_program(train):
    model = Network(nnx.Rngs(0))
    model.train() if train else model.eval()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(TOKENS,))
    assert {name: leaf.reduction_axes for name, leaf in plan.items()} == AXES
    assert plan.dense["embed/embedding"] == "embedding"
    assert {leaf.source for leaf in plan.values()} == {"program"}
    after = nnx.state(model, nnx.Not(nnx.RngState))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    model(jnp.zeros((2, 6), int))  # No tracer is left in the module.


def test_the_plan_fits_the_state_of_the_parameters():
    model = Network(nnx.Rngs(0))
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(TOKENS,))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    kernel = np.asarray(nmjax.prune(params, plan)["project"]["kernel"][...])
    assert ((kernel != 0).reshape(4, 4, 4, 8).sum(1) == 2).all()

    def forward(params, tokens):
        return nnx.merge(graph, params, rest)(tokens)

    nmjax.check_axes(plan, forward, params, TOKENS)


def test_shapes_and_arguments():
    model = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    plan = nmjax.nnx.make_plan(
        model, "1:4", inputs=(TOKENS,), call={"scale": 2.0}, exclude="head", rules={"up": "2:8"}
    )
    assert {name: str(leaf.pattern) for name, leaf in plan.items()} == {
        "back/kernel": "1:4",
        "project/kernel": "1:4",
        "up/kernel": "2:8",
    }


@pytest.mark.parametrize("build", [lambda build: build(), nnx.eval_shape])
@pytest.mark.parametrize("is_number", [True, False])
def test_variables_that_are_not_arrays_of_numbers(build, is_number):
    class Noisy(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
            self.extra = nnx.Variable(3 if is_number else jax.random.key(0, impl="rbg"))

        def __call__(self, x):
            extra = self.extra.get_value()
            return self.layer(x) * (jnp.float32(extra) if is_number else jax.random.uniform(extra))

    plan = nmjax.nnx.make_plan(build(Noisy), "2:4", inputs=((1, 16),))
    assert plan["layer/kernel"].reduction_axes == (-2,)


@pytest.mark.parametrize("argument", [{"forward": lambda params, x: x}, {"deterministic": True}])
def test_arguments_that_belong_elsewhere(argument):
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=rf"reads the program.*call=.*{next(iter(argument))}"):
        nmjax.nnx.make_plan(model, "2:4", inputs=((1, 16),), **argument)


def test_what_is_not_a_module():
    with pytest.raises(TypeError, match="expected an NNX module, got dict"):
        nmjax.nnx.make_plan({}, "2:4", inputs=((1, 8),))


def test_names_and_shapes_alone_are_not_enough():
    with pytest.raises(ValueError, match="unknown axes"):
        nmjax.make_plan(nnx.state(Network(nnx.Rngs(0)), nnx.Param), "2:4")


@pytest.mark.parametrize("plan", ["2:4", "1x4@0.5", None])
def test_cost_counts_the_multiply_adds(plan):
    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(8, 16, (3, 3), padding="VALID", rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x, scale=1.0):
            return self.head(self.dropout(self.conv(x)).mean((1, 2))) * scale

    model = Layers(nnx.Rngs(0))
    table = nmjax.nnx.cost(model, plan, (1, 6, 6, 8), scale=2.0)
    # 4 x 4 output pixels of 9 taps.
    macs = {"conv/kernel": 16 * 9 * 8 * 16, "head/kernel": 16 * 8}
    assert {name: leaf.macs for name, leaf in table.leaves.items() if leaf.macs} == macs
    density = 1.0 if plan is None else 0.5
    assert table.total.macs_kept == sum(macs.values()) * density
    if plan:
        made = nmjax.nnx.make_plan(model, plan, inputs=((1, 6, 6, 8),))
        assert nmjax.nnx.cost(model, made, jnp.zeros((1, 6, 6, 8))) == table
    assert int(model.dropout.rngs.count[...]) == 0


def test_cost_of_what_is_not_a_module():
    with pytest.raises(TypeError, match="expected an NNX module, got dict"):
        nmjax.nnx.cost({}, "2:4", (1, 8))

"""What a whole training step of every method must do, as a table: optimizer part included."""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax import methods
from tests.nmjax.methods.test_conformance import NOT_METHODS

KEY = jax.random.key(0)
COLLECTIVE = re.compile(r"all-(reduce|gather|to-all)|collective-permute|reduce-scatter")


def init(key, dtype=jnp.float32):
    # Eight outputs, one for each device.
    return {"kernel": jax.random.normal(key, (16, 8), dtype), "bias": jnp.ones(8, dtype)}


PARAMS = init(KEY)
PLAN = nmjax.make_plan(PARAMS, "2:4")
TARGET = jax.random.normal(jax.random.key(1), (16, 8))


class Row(NamedTuple):
    """A method, and whether it has to communicate between devices that hold different outputs."""

    make: Callable[[], nmjax.Sparsifier | methods.Method]
    communicates: bool = False


METHODS = {
    "straight_through": Row(lambda: methods.straight_through(PLAN)),
    "decaying_mask": Row(
        lambda: methods.decaying_mask(PLAN, 1, 5, gradient="scaled", lambda_w=0.1)
    ),
    "decaying_mask of the structure": Row(
        lambda: methods.decaying_mask(PLAN, 0, 4, decay="stepwise", lambda_w=0.1)
    ),
    "dense_then": Row(lambda: methods.dense_then(PLAN, 2, lambda_w=0.1)),
    "max_q": Row(lambda: methods.max_q(PLAN, nmjax.linear_ramp(0, 4), lambda_w=0.1), True),
    "step": Row(lambda: methods.step(PLAN, 1, 3, b2=0.7), True),
    "cast": Row(lambda: methods.cast(PLAN, 5, lambda_w=0.1, refresh_every=2)),
    "lbc": Row(lambda: methods.lbc(PLAN, 0, 5, 0.1)),
    "hu_2024": Row(lambda: methods.hu_2024(PLAN, refresh_every=2, lambda_w=0.1), True),
    "s_ste": Row(lambda: methods.s_ste(PLAN)),
    "sup_tickets": Row(lambda: methods.sup_tickets(PLAN, 1, 2, 2, lambda_w=0.1), True),
    "free_tickets": Row(lambda: methods.free_tickets(PLAN, 1, 2, 2), True),
    "bi_mask": Row(lambda: methods.bi_mask(PLAN, lambda_w=0.1, refresh_every=2, tries=2), True),
}


@pytest.fixture(params=METHODS)
def row(request):
    return METHODS[request.param]


def make_step(row):
    """The functions `init(key) -> carry` and `step(carry, count) -> carry`."""
    made = row.make()
    if isinstance(made, methods.Method):
        sparsifier, part, follow = made
        tx = optax.chain(part, optax.scale_by_learning_rate(0.1))
    else:
        sparsifier, tx = made, optax.sgd(0.1, momentum=0.9)
        follow = None

    def begin(params, key):
        return params, sparsifier.init(params, key), tx.init(params)

    def step(carry, count):
        params, state, opt_state = carry
        state = sparsifier.refresh(state, params, count)

        def loss_of(params):
            sparse = sparsifier.apply(params, state)
            # Without a product, so that whatever communicates is the method.
            error = (sparse["kernel"] - TARGET.astype(sparse["kernel"].dtype)) ** 2
            return jnp.sum(error) + jnp.sum(sparse["bias"] ** 2)

        grads, masks = jax.grad(loss_of)(params), getattr(state, "masks", None)
        updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
        params = optax.apply_updates(params, updates)
        return params, state if follow is None else follow(state, opt_state), opt_state

    return begin, step


def test_a_run_compiles_once_donates_and_resumes_exactly(row):
    begin, step = make_step(row)
    compiled = jax.jit(chex.assert_max_traces(n=1)(step), donate_argnums=0)
    begin = jax.jit(begin)
    carry = begin(PARAMS, KEY)
    shapes = jax.tree.map(jnp.shape, carry)
    for count in range(6):
        if count == 3:
            # As a checkpoint gives it back.
            carry = jax.tree.map(lambda x: jnp.asarray(np.array(x)), carry)
        carry = compiled(carry, np.int32(count))
    assert jax.tree.map(jnp.shape, carry) == shapes
    begun = begin(PARAMS, KEY)
    whole, _ = jax.jit(lambda c: jax.lax.scan(lambda c, n: (step(c, n), None), c, jnp.arange(6)))(
        begun
    )
    chex.assert_trees_all_close(carry, whole, rtol=1e-5, atol=1e-6)
    assert not np.allclose(carry[0]["kernel"], PARAMS["kernel"])


def test_seeds_train_together(row):
    begin, step = make_step(row)

    def run(params):
        return jax.lax.fori_loop(0, 5, lambda n, c: step(c, n), begin(params, KEY))[0]

    seeds = jax.tree.map(lambda w: jnp.stack([w, jnp.cos(7 * w)]), PARAMS)
    together, run = jax.jit(jax.vmap(run))(seeds), jax.jit(run)
    for i in range(2):
        alone = run(jax.tree.map(lambda x, i=i: x[i], seeds))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6
        )


@pytest.mark.optimized
def test_devices_with_different_outputs_do_not_communicate(row):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    begin, step = make_step(row)

    def place(x):
        spec = PartitionSpec(*[None] * (jnp.ndim(x) - 1), "d") if jnp.ndim(x) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        # States have the placement of their weights.
        params = jax.tree.map(place, PARAMS)
        carry = jax.jit(begin)(params, KEY)
        text = jax.jit(step).lower(carry, jnp.int32(3)).compile().as_text()
    assert bool(COLLECTIVE.search(text)) == row.communicates


def test_every_method_has_a_row():
    made_by = {name.split()[0] for name in METHODS}
    functions = {name for name in methods.__all__ if inspect.isfunction(getattr(methods, name))}
    others = {name for name in functions if name.endswith(NOT_METHODS)}
    assert functions - others - {"dense", "one_shot", "soft_uniform_blocks"} == made_by


def test_bfloat16_parameters_stay_bfloat16(row):
    begin, step = make_step(row)
    carry = begin(init(KEY, jnp.bfloat16), KEY)
    after = jax.eval_shape(step, carry, jnp.int32(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: carry))

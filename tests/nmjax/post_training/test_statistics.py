"""Statistics of activations, for every way in which a program multiplies by a weight."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.post_training import Statistics, collect
from nmjax.post_training.matrices import Matrices
from nmjax.tracing.multiply_adds import multiply_adds

RNG = np.random.RandomState(0)


def conv(w, x, strides=(1,), padding="SAME", **settings):
    space = "HW"[: x.ndim - 2]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **settings)


def unrolled(w, x):
    return jnp.stack([x[i] @ w[i] for i in range(3)])


def in_scan(w, x):
    return lax.scan(lambda _, both: (0, both[1] @ both[0]), 0, (w, x))[1]


def in_two_scans(w, x):
    first = lax.scan(lambda _, both: (0, both[1] @ both[0]), 0, (w[:1], x[:1]), reverse=True)[1]
    return [first, in_scan(w[1:], x[1:])]


def recurrent(w, x):
    return lax.scan(lambda _, x: (0, x @ w), 0, x)[1]


def in_nested_scans(w, x):
    return lax.scan(lambda _, both: (0, in_scan(*both)), 0, (w, x))[1]


def in_cond(w, x):
    return lax.cond(x[0, 0] > 99, lambda: jnp.zeros((5, 6), x.dtype), lambda: jnp.dot(x, w))


def in_while(w, x):
    def step(state):
        i, y = state
        return i + 1, y.at[i].set(x[i] @ w)

    return lax.while_loop(lambda state: state[0] < 3, step, (0, jnp.zeros((3, 5, 6), x.dtype)))[1]


@jax.custom_jvp
def own_rule(w, x):
    return jax.jit(lambda w, x: x @ (w * jnp.ones_like(w)))(w, x)


own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), own_rule(*primals)))


def cases():
    """Products, each linear in the weight: (name, function, weight's shape, input's shape)."""
    dense, stack, rows = (8, 6), (3, 8, 6), (3, 5, 8)
    yield "dense", lambda w, x: x @ w, dense, (2, 5, 8)
    yield "stored as (out, in)", lambda w, x: x @ w.T, (6, 8), (5, 8)
    yield "calls", lambda w, x: jax.checkpoint(own_rule)(w, x), dense, (5, 8)
    yield "query", lambda w, x: jnp.einsum("btd,dnh->btnh", x, w), (8, 2, 3), (2, 5, 8)
    yield "out", lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (2, 4, 6), (2, 5, 2, 4)
    yield "axes swapped", lambda w, x: jnp.einsum("thn,nhd->td", x, w), (2, 4, 6), (5, 4, 2)
    yield "reshaped", lambda w, x: x.reshape(5, 8) @ w.reshape(8, 6), (2, 4, 6), (5, 2, 4)
    yield "in two parts", lambda w, x: [x @ w[:, :2], x @ w[:, 2:]], dense, (5, 8)
    yield "experts", lambda w, x: jnp.einsum("etd,edf->etf", x, w), stack, rows
    yield "vmap", jax.vmap(lambda w, x: x @ w), stack, rows
    yield "vmap of the input", jax.vmap(lambda w, x: x @ w, (None, 0)), dense, rows
    yield "unrolled", unrolled, stack, rows
    yield "scan", in_scan, stack, rows
    yield "two scans", in_two_scans, stack, rows
    yield "nested scans", in_nested_scans, (2, 3, 8, 6), (2, 3, 5, 8)
    yield (
        "scan of vmap",
        lambda w, x: lax.map(lambda a: jnp.einsum("etd,edf->etf", *a), (x, w)),
        (
            2,
            *stack,
        ),
        (2, *rows),
    )
    yield "recurrent", recurrent, dense, rows
    yield "cond", in_cond, dense, (5, 8)
    yield "while", in_while, dense, rows
    yield "conv", lambda w, x: conv(w, x, (2, 1), "VALID"), (3, 2, 4, 6), (2, 7, 6, 4)
    yield "dilated", lambda w, x: conv(w, x, rhs_dilation=(2,)), (3, 4, 6), (2, 9, 4)
    yield (
        "transposed",
        lambda w, x: conv(w, x, (1,), [(1, 2)], lhs_dilation=(2,)),
        (3, 4, 6),
        (2, 5, 4),
    )
    yield "grouped", lambda w, x: conv(w, x, feature_group_count=2), (3, 4, 6), (2, 7, 8)
    yield "vmap of conv", jax.vmap(conv), (2, 3, 4, 6), (2, 2, 7, 4)
    yield (
        "vmap of grouped",
        jax.vmap(lambda w, x: conv(w, x, feature_group_count=2)),
        (2, 3, 4, 6),
        (2, 2, 7, 8),
    )


CASES = {name: case for name, *case in cases()}
# Each of these holds an idea that no other case has.
QUICK = (
    "calls, out, in two parts, experts, unrolled, two scans, nested scans, recurrent, cond, while"
)
QUICK += ", conv, vmap of grouped"


def observed(function, w_shape, x_shape, pattern="1:2", kind="gram", **settings):
    """A weight, an input, the plan of the weight, and its statistics."""
    w, x = (jnp.array(RNG.randn(*shape), jnp.float32) for shape in (w_shape, x_shape))

    def forward(params, x):
        return function(params["w"], x)

    plan = nmjax.make_plan({"w": w}, pattern, forward=forward, inputs=(x,))
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return w, x, plan, collect(forward, {"w": w}, [x], plan, kind, **settings)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK.split(", ") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_grams_give_the_energy_of_every_product(name):
    """|X W|^2 is the sum over outputs of n w^T G w, for a weight with no symmetry."""
    function, w_shape, x_shape = CASES[name]
    w, x, plan, statistics = observed(function, w_shape, x_shape)
    gram, rows = (np.float64(part["w"]) for part in (statistics.means, statistics.rows))
    matrices = np.float64(Matrices(plan["w"], w.shape, gram.shape[-3]).of(w))
    if name == "in two parts":  # Both parts of the outputs meet the same rows.
        rows /= 2
    energies = np.einsum("...io,...ij,...jo,...->...", matrices, gram, matrices, rows)
    outputs = jax.tree.leaves(function(w, x))
    assert energies.sum() == pytest.approx(sum(float((y**2).sum()) for y in outputs), rel=1e-5)
    # Rows are counted: each row costs in * out multiply-adds, in every matrix.
    macs = multiply_adds(lambda w, x: function(w, x), w, x)[""]
    if name not in ("cond", "while", "transposed"):
        assert (rows * np.prod(matrices.shape[-2:])).sum() == macs


def test_mean_squares_are_the_diagonals_of_grams():
    for name in ("experts", "grouped"):
        RNG.seed(1)
        gram = observed(*CASES[name])[-1]
        RNG.seed(1)
        squares = observed(*CASES[name], kind="mean_square")[-1]
        np.testing.assert_allclose(squares["w"], gram.mean_square("w"), rtol=1e-5)
        assert squares["w"].shape == gram["w"].shape[:-1]


def network(params, x):
    h = jnp.tanh(x @ params["first"])
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    return h @ params["last"].T


PARAMS = {
    "first": np.float32(RNG.randn(8, 4)),
    "stack": np.float32(RNG.randn(2, 4, 4)),
    "last": np.float32(RNG.randn(4, 4)),
}
BATCHES = [np.float32(RNG.randn(rows, 8)) for rows in (4, 4, 12)]


@pytest.fixture(scope="module")
def plan():
    return nmjax.make_plan(PARAMS, "2:4", forward=network, inputs=(BATCHES[0],))


@pytest.fixture(scope="module")
def whole(plan):
    return collect(network, PARAMS, BATCHES, plan, "gram")


def test_batches_of_different_sizes_are_weighted_by_their_rows(plan, whole):
    h = np.concatenate(BATCHES)
    np.testing.assert_allclose(whole["first"][0], h.T @ h / 20, rtol=1e-5)
    h = np.tanh(h @ PARAMS["first"])
    for i in range(2):
        np.testing.assert_allclose(whole["stack"][i, 0], h.T @ h / 20, rtol=1e-4)
        h = np.tanh(h @ PARAMS["stack"][i])
    assert whole.rows["stack"].tolist() == [[20.0], [20.0]]


def test_statistics_continue_where_they_stopped(plan, whole):
    with pytest.warns(UserWarning, match="first: at most 4 of 8"):
        part = collect(network, PARAMS, BATCHES[:1], plan, "gram")
    resumed = collect(network, PARAMS, iter(BATCHES[1:]), plan, "gram", start=part)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), resumed, whole)
    with pytest.raises(ValueError, match="start= must come from the same plan and kind"):
        collect(network, PARAMS, BATCHES, plan, "mean_square", start=part)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_sharded_batch_gives_the_same(plan, whole, kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, jax.NamedSharding(mesh, P("data"))) for x in BATCHES]
        found = collect(network, PARAMS, sharded, plan, "gram")
    np.testing.assert_allclose(found["last"], whole["last"], rtol=1e-5)


def test_statistics_are_a_pytree_and_a_mapping(whole):
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(whole)
    assert isinstance(doubled, Statistics)
    assert doubled.keys() == {"first", "stack", "last"}
    np.testing.assert_array_equal(doubled["last"], 2 * whole["last"])


def test_the_progress_says_how_much_time_is_left(plan, capfd):
    collect(network, PARAMS, BATCHES, plan, progress=True)
    shown = capfd.readouterr().err
    assert "mean_square statistics: 2 of 3, " in shown
    assert "s left" in shown
    collect(network, PARAMS, BATCHES[:1], plan)
    assert capfd.readouterr().err == ""


@pytest.mark.not_under("jax_debug_nans")
def test_not_finite_inputs_name_the_first_layer_and_the_batch(plan):
    broken = {**PARAMS, "stack": PARAMS["stack"] * np.float32([np.nan, 1])[:, None, None]}
    # The first matrix of the stack meets good inputs, the second one does not.
    with pytest.raises(ValueError, match="batch 0: the inputs of stack hold NaN"):
        collect(network, broken, BATCHES, plan)
    with pytest.raises(ValueError, match="batch 1: the inputs of first hold NaN"):
        collect(network, PARAMS, [BATCHES[0], BATCHES[1] * np.inf], plan)


def test_batches_that_do_not_fit_are_an_error(plan):
    with pytest.raises(TypeError) as error:
        collect(network, PARAMS, [BATCHES[0], jnp.ones((2, 7))], plan)
    assert "inputs of batch 1, of shapes [(2, 7)]" in error.value.__notes__[-1]
    with pytest.raises(ValueError, match="there are no batches"):
        collect(network, PARAMS, [], plan)
    with pytest.raises(TypeError, match="batches must be a list"):
        collect(network, PARAMS, BATCHES[0], plan)
    with pytest.raises(ValueError, match='kind must be "mean_square" or "gram"'):
        collect(network, PARAMS, BATCHES, plan, "hessian")


def test_a_leaf_in_no_product_is_an_error(plan):
    with pytest.raises(ValueError, match="  stack: in no product with an activation"):
        collect(lambda p, x: x @ p["first"] @ p["last"].T, PARAMS, BATCHES, plan)


def test_memory_is_checked_before_the_first_batch(plan):
    with pytest.raises(MemoryError, match=r"largest are those of first, of shape \(1, 8, 8\)"):
        collect(network, PARAMS, BATCHES, plan, "gram", memory_limit=2 * 4 * 111)
    # 64 + 2 * 16 + 16 numbers, twice.
    collect(network, PARAMS, BATCHES, plan, "gram", memory_limit=2 * 4 * 112)


@pytest.mark.parametrize(
    ("function", "w_shape", "x_shape", "axes", "message"),
    [
        (lambda w, x: x @ w.T, (8, 8), (5, 8), -2, r"inputs are the axes \[-2\], but .* \[-1\]"),
        (lambda w, x: x[::-1] @ w[::-1], (8, 6), (5, 8), -2, "reorders its inputs by a reversal"),
        (lambda w, x: x @ w[jnp.argmax(x[0]) % 3], (3, 8, 6), (5, 8), -2, "computed numbers"),
    ],
)
def test_what_cannot_be_told_apart_is_an_error(function, w_shape, x_shape, axes, message):
    w, x = (jnp.array(RNG.randn(*shape), jnp.float32) for shape in (w_shape, x_shape))
    roles = nmjax.Axes((axes,), (-1,)) if axes == -2 and len(w_shape) == 3 else axes
    plan = nmjax.make_plan({"w": w}, "1:2", axes={"w": roles})
    with pytest.raises(NotImplementedError, match=rf"^w .*{message}.*exclude="):
        collect(lambda params, x: function(params["w"], x), {"w": w}, [x], plan)

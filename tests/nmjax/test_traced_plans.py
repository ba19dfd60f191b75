"""Plans read off a program, leaves with unknown axes, and plans checked against a program."""

import warnings

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import Axes, check_axes, make_plan

X = jax.ShapeDtypeStruct((2, 16), jnp.float32)
# Stored as (out, in); the names say nothing.
PARAMS = {"up": jnp.ones((32, 16)), "down": jnp.ones((8, 32)), "gain": jnp.ones((2, 16))}


def forward(params, x):
    return jnp.tanh(x * params["gain"] @ params["up"].T) @ params["down"].T


def test_the_plan_is_what_the_program_sums_over():
    plan = make_plan(PARAMS, "2:4", forward=forward, inputs=(X,))
    assert {name: leaf.reduction_axes for name, leaf in plan.items()} == {
        "up": (-1,),
        "down": (-1,),
    }
    assert plan.dense == {"gain": "in no product: meets activations entry by entry"}
    assert "program" in str(plan).splitlines()[2]
    pruned = nmjax.prune(PARAMS, plan)
    assert ((pruned["up"] != 0).reshape(32, 4, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "2:4/4"])
def test_a_program_that_prunes_has_the_plan_of_the_dense_one(pattern):
    plan = make_plan(PARAMS, pattern, forward=forward, inputs=(X,))

    def masked(params):
        return nmjax.prune(params, plan, nmjax.compute_masks(params, plan))

    for sparse in (nmjax.prune, nmjax.sparsify, lambda params, _: masked(params)):
        pruned = make_plan(
            PARAMS, pattern, forward=lambda p, x, f=sparse: forward(f(p, plan), x), inputs=(X,)
        )
        assert pruned == plan


def test_blocks_take_outputs_and_taps_from_the_program():
    def convolve(params, x):
        return jax.lax.conv(x, params["w"], (1, 1), "SAME")  # OIHW

    params = {"w": jax.ShapeDtypeStruct((8, 4, 3, 3), jnp.float32)}
    plan = make_plan(params, "1x4@0.5", forward=convolve, inputs=((1, 4, 6, 6),))
    assert plan["w"].axes == Axes((-3,), (-4,), (-2, -1))
    plan = make_plan(params, "2:12/kernel", forward=convolve, inputs=((1, 4, 6, 6),))
    assert plan["w"].reduction_axes == (-3, -2, -1)


@pytest.mark.filterwarnings("ignore:axes= replaces")
def test_axes_by_hand_come_before_the_program():
    plan = make_plan(PARAMS, "2:4", forward=forward, inputs=(X,), axes={"up": -2})
    assert (plan["up"].reduction_axes, plan["up"].source) == ((-2,), "given")
    assert plan["down"].source == "program"


def test_where_axes_come_from_does_not_matter_to_equality():
    given = make_plan(PARAMS, "2:4", axes={"up|down": -1}, exclude="gain")
    traced = make_plan(PARAMS, "2:4", forward=forward, inputs=(X,))
    assert dict(given) == dict(traced)
    assert hash(given["up"]) == hash(traced["up"])


@pytest.mark.parametrize("inputs", [(X,), [X], ((2, 16),), (jnp.ones((2, 16)),)])
def test_inputs_may_be_arrays_or_shapes(inputs):
    assert set(make_plan(PARAMS, "2:4", forward=forward, inputs=inputs)) == {"up", "down"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forward": forward, "inputs": jnp.ones((2, 16))}, TypeError, r"inputs=\(x,\)"),
        ({"forward": forward}, ValueError, "inputs are needed"),
        ({"inputs": (X,)}, ValueError, "pass forward= too"),
        ({"on_unknown": "skip"}, ValueError, "on_unknown must be"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_plan(PARAMS, "2:4", **arguments)


# Unknown axes


def test_all_unknown_leaves_are_listed_with_the_ways_out():
    params = {**PARAMS, "known": {"w": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="unknown axes") as error:
        make_plan(params, "2:4")
    message = str(error.value)
    for text in (
        "  up (32, 16): ",
        "  down (8, 32): ",
        "forward=",
        "axes=",
        "exclude=",
        "on_unknown=",
    ):
        assert text in message
    assert "known/w" not in message


def test_what_the_program_does_not_show_is_listed_without_advice_to_trace():
    def merged(params, x):
        return x @ (params["up"] + params["down"] @ params["c"])

    params = {"up": jnp.ones((16, 8)), "down": jnp.ones((16, 2)), "c": jnp.ones((2, 8))}
    with pytest.raises(ValueError, match="derived from c, down, up") as error:
        make_plan(params, "2:4", forward=merged, inputs=(X,))
    assert "forward=" not in str(error.value)
    plan = make_plan(params, "2:4", forward=merged, inputs=(X,), axes={"up": -2}, exclude="down|c")
    assert set(plan) == {"up"}


def test_excluded_leaves_may_be_unknown():
    params = {"w": jnp.ones((8, 8)), "odd": jnp.ones((8, 8)), "ids": jnp.ones((8, 8), int)}
    assert set(make_plan(params, "2:4", exclude="odd")) == {"w"}
    assert set(make_plan(params, "2:4", include="w")) == {"w"}
    assert set(make_plan(params, "2:4", rules={"odd": None})) == {"w"}


def test_dense_on_request_and_loud_if_that_is_most():
    params = {"w": jnp.ones((8, 8)), "odd": jnp.ones((8, 16))}
    plan = make_plan(params, "2:4", on_unknown="dense")
    assert set(plan) == {"w"}
    assert plan.dense["odd"].startswith("unknown axes: ")
    assert "WARNING: 128 of 192 parameters (67%)" in str(plan)
    assert "WARNING" in plan._repr_html_()
    with pytest.warns(UserWarning, match="128 of 192 parameters"):
        nmjax.pack(nmjax.prune(params, plan), plan)


def test_quiet_if_it_is_less():
    params = {"w": jnp.ones((8, 16)), "odd": jnp.ones((8, 8))}
    plan = make_plan(params, "2:4", on_unknown="dense")
    assert "WARNING" not in str(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nmjax.pack(nmjax.prune(params, plan), plan)


# Checks


def test_a_plan_from_the_program_passes():
    check_axes(make_plan(PARAMS, "2:4", forward=forward, inputs=(X,)), forward, PARAMS, X)
    check_axes(make_plan(PARAMS, "1x4@0.5", forward=forward, inputs=(X,)), forward, PARAMS, X)


def test_every_wrong_leaf_is_named():
    plan = make_plan(PARAMS, "2:4", axes={"": -2}, exclude="gain")
    with pytest.raises(ValueError, match="the plan and the program disagree") as error:
        check_axes(plan, forward, PARAMS, X)
    lines = str(error.value).splitlines()
    assert lines[1:3] == [
        "  down (8, 32): planned along -2, but the program sums over -1",
        "  up (32, 16): planned along -2, but the program sums over -1",
    ]


def test_a_planned_leaf_in_no_product():
    plan = make_plan(PARAMS, "2:4", axes={"": -1})
    with pytest.raises(ValueError, match=r"gain \(2, 16\): planned along -1, but it is in no prod"):
        check_axes(plan, forward, PARAMS, X)


def test_leaves_that_the_program_does_not_use_are_not_checked():
    plan = make_plan({**PARAMS, "w": jnp.ones((8, 8))}, "2:4", exclude="up|down|gain")
    check_axes(plan, forward, {**PARAMS, "w": jnp.ones((8, 8))}, X)


def test_one_of_two_products_is_enough():
    def both_ways(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    params = {"w": jnp.ones((16, 8))}
    for axis in (-2, -1):
        check_axes(make_plan(params, "2:4", axes={"w": axis}), both_ways, params, X)


def test_blocks_along_the_right_inputs_but_the_wrong_outputs():
    def heads(params, x):
        return jnp.einsum("bi,ino->bno", x, params["w"])

    params = {"w": jnp.ones((16, 4, 8))}
    plan = make_plan(params, "1x4@0.5", axes={"w": Axes((-3,), (-1,))})
    with pytest.raises(ValueError, match="planned along -3 x -1, but the program sums over -3"):
        check_axes(plan, heads, params, X)
    check_axes(make_plan(params, "2:4", axes={"w": -3}), heads, params, X)


def test_bad_arguments_of_the_check():
    plan = make_plan(PARAMS, "2:4", forward=forward, inputs=(X,))
    with pytest.raises(ValueError, match=r"params does not have: \['up'\]"):
        check_axes(plan, forward, {"down": PARAMS["down"], "gain": PARAMS["gain"]}, X)
    with pytest.raises(ValueError, match="inputs are needed"):
        check_axes(plan, forward, PARAMS)
    with pytest.raises(TypeError, match="expected a plan"):
        check_axes("2:4", forward, PARAMS, X)


def test_a_large_decoder_needs_no_memory():
    width, layers = 4096, 4
    params = {
        f"layer_{i}": {
            "q_proj": jax.ShapeDtypeStruct((width, 32, 128), jnp.float32),
            "o_proj": jax.ShapeDtypeStruct((32, 128, width), jnp.float32),
        }
        for i in range(layers)
    }

    def decode(params, x):
        for layer in params.values():
            heads = jnp.einsum("btd,dnh->btnh", x, layer["q_proj"])
            x = x + jnp.einsum("btnh,nhd->btd", heads, layer["o_proj"])
        return x

    plan = make_plan(params, "2:4", forward=decode, inputs=((1, 8, width),))
    axes = [leaf.reduction_axes for leaf in plan.values()]
    assert sorted(axes) == sorted([(-3,), (-3, -2)] * layers)
    assert np.prod(plan["layer_0/q_proj"].shape) == width**2


# What is said


def test_given_axes_that_replace_those_of_the_program_are_reported():
    params = {"a": jnp.ones((16, 8)), "b": jnp.ones((8, 8))}

    def two(params, x):
        return x @ params["a"] @ params["b"]

    with pytest.warns(UserWarning, match=r"a \(16, 8\): given -1, but the program sums over -2"):
        plan = make_plan(params, "2:4", forward=two, inputs=(X,), axes={"a": -1})
    assert plan["a"].reduction_axes == (-1,)
    assert plan["b"].reduction_axes == (-2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(params, "2:4", forward=two, inputs=(X,), axes={"a": -2})
        make_plan(params, "2:4", axes={"a": -1})


def test_shapes_of_token_ids_are_explained():
    params = {"table": jnp.ones((32, 8)), "w": jnp.ones((8, 8))}

    def look_up(params, tokens):
        return params["table"][tokens] @ params["w"]

    for call in (
        lambda tokens: make_plan(params, "2:4", forward=look_up, inputs=(tokens,)),
        lambda tokens: check_axes(
            make_plan(params, "2:4", axes={"w": -2}), look_up, params, tokens
        ),
        lambda tokens: nmjax.cost(look_up, params, tokens),
    ):
        with pytest.raises(TypeError, match=r"jax\.ShapeDtypeStruct\(shape, jnp\.int32\)"):
            call((1, 4))
        call(jax.ShapeDtypeStruct((1, 4), jnp.int32))


def test_errors_of_programs_without_shapes_are_left_alone():
    def broken(params, x):
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError) as error:
        make_plan(PARAMS, "2:4", forward=broken, inputs=(jnp.ones((1, 8)),))
    assert not any("ShapeDtypeStruct" in note for note in getattr(error.value, "__notes__", ()))


def test_a_pattern_that_divides_nothing_names_the_way_out():
    params = {"w": jnp.ones((10, 8))}
    with pytest.raises(
        ValueError, match=r"(?s)no leaf becomes sparse.*10 inputs.*2:4 does not div"
    ):
        make_plan(params, "2:4", on_indivisible="dense")


def test_what_is_no_array_has_no_parameters():
    model = equinox.nn.MLP(8, 4, 8, 1, key=jax.random.key(0))
    arrays = sum(x.size for x in jax.tree.leaves(equinox.filter(model, equinox.is_array)))
    text = str(make_plan(model, "2:4"))
    assert f"of {arrays:,} parameters" in text
    rows = [line for line in text.splitlines() if "not an array" in line]
    assert {line.split("dense")[1].split()[0] for line in rows} == {"0"}

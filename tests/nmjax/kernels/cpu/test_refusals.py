"""The compiled kernels called past their checks in Python: errors, never a crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.kernels.cpu.library import load_library

pytestmark = pytest.mark.skipif(
    load_library().instruction_set is None, reason=f"no kernels: {load_library().reason}"
)

F32 = jnp.float32
# The second from calls that have returned already.
ERRORS = (jax.errors.JaxRuntimeError, ValueError)
# 2 rows of 1x4 blocks over 6 inputs, 3 kept in each.
BLOCKS = {
    "x": jnp.ones((1, 1, 5, 6), F32),
    "values": jnp.ones((2, 3, 4), F32),
    "indices": jnp.array([[0, 1, 5], [2, 3, 4]], jnp.uint8),
    "row_pointers": jnp.zeros(0, jnp.int32),
    "bias": jnp.zeros(0, F32),
    "shape": (1, 1, 5, 8),
    "n": 4,
    "window": (1, 1, 1, 1, 0, 0, 1, 1),
}
# The same blocks with pointers, as a layer whose rows differ.
LAYER = {
    **BLOCKS,
    "values": jnp.ones((6, 4), F32),
    "indices": jnp.array([0, 1, 5, 2, 3, 4], jnp.uint8),
    "row_pointers": jnp.array([0, 3, 6], jnp.int32),
}
GROUPS = {
    "x": jnp.ones((5, 8), F32),
    "values": jnp.ones((2, 2, 16), F32),
    "codes": jnp.full((1, 16), 0b01_00_01_00, jnp.uint8),
    "bias": jnp.zeros(0, F32),
    "shape": (5, 16),
    "m": 4,
}


def run_blocks(x, values, indices, row_pointers, bias, shape, n, window):
    call = jax.ffi.ffi_call("nmjax_blocks", jax.ShapeDtypeStruct(shape, F32))
    y = call(
        x, values, indices, row_pointers, bias,
        n=np.int64(n), relu=False, window=np.array(window, np.int64),
    )  # fmt: skip
    return np.asarray(y)


def run_int8(scales, values=None):
    values = BLOCKS["values"].astype(jnp.int8) if values is None else values
    call = jax.ffi.ffi_call("nmjax_blocks_int8", jax.ShapeDtypeStruct(BLOCKS["shape"], F32))
    weight = (values, BLOCKS["indices"], BLOCKS["row_pointers"], BLOCKS["bias"], scales)
    moves = np.array(BLOCKS["window"], np.int64)
    return np.asarray(call(BLOCKS["x"], *weight, n=np.int64(4), relu=False, window=moves))


INTEGERS = {
    "x": jnp.full((5, 6), 2, jnp.int8),
    "steps": jnp.full(5, 0.5, F32),
    "values": BLOCKS["values"].astype(jnp.int8),
    "indices": BLOCKS["indices"],
    "row_pointers": BLOCKS["row_pointers"],
    "bias": BLOCKS["bias"],
    "scales": jnp.ones(8, F32),
    "shape": (5, 8),
    "n": 4,
}


def run_integers(shape, n, **arrays):
    call = jax.ffi.ffi_call("nmjax_integers", jax.ShapeDtypeStruct(shape, F32))
    return np.asarray(call(*arrays.values(), n=np.int64(n), relu=False))


def run_groups(x, values, codes, bias, shape, m):
    call = jax.ffi.ffi_call("nmjax_groups", jax.ShapeDtypeStruct(shape, F32))
    return np.asarray(call(x, values, codes, bias, m=np.int64(m), relu=False))


def test_as_they_are_called():
    for arguments in (BLOCKS, LAYER):
        np.testing.assert_array_equal(run_blocks(**arguments), np.full((1, 1, 5, 8), 3))
    np.testing.assert_array_equal(run_groups(**GROUPS), np.full((5, 16), 4))
    np.testing.assert_array_equal(run_int8(jnp.full(8, 2.0, F32)), np.full((1, 1, 5, 8), 6))
    np.testing.assert_array_equal(run_integers(**INTEGERS), np.full((5, 8), 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "at least one output"),
        ({"n": 3}, "do not fit each other"),
        ({"shape": (5, 1, 8)}, "matrices"),
        ({"shape": (6, 8)}, "a scale for each row"),
        ({"steps": jnp.ones(4, F32)}, "a scale for each row"),
        ({"scales": jnp.ones(4, F32)}, "for each output"),
        ({"x": jnp.ones((5, 6), F32)}, "of int8 expected"),
        ({"x": jnp.ones((5, 2**17 + 1), jnp.int8)}, "too many inputs"),
        ({"values": jnp.ones((2, 3, 4), F32)}, "of int8 expected"),
        ({"values": jnp.ones((2, 2, 4), jnp.int8)}, "do not fit each other"),
        ({"indices": jnp.full((2, 3), 6, jnp.uint8)}, "index out of range"),
        (
            {"indices": jnp.zeros((2, 7), jnp.uint8), "values": jnp.ones((2, 7, 4), jnp.int8)},
            "too many blocks",
        ),
        ({"row_pointers": jnp.array([0, 7, 6], jnp.int32)}, "descend"),
        ({"bias": jnp.zeros(7, F32)}, "do not fit each other"),
    ],
)
@pytest.mark.parametrize("rows", [5, 20])
def test_integers_by_integers(rows, changes, words):
    arguments = {**INTEGERS, **changes}
    if rows == 20:  # Many rows take another path.
        arguments["x"] = jnp.tile(arguments["x"], (4, 1))
        arguments["steps"] = jnp.tile(arguments["steps"], 4)
        arguments["shape"] = (4 * arguments["shape"][0], *arguments["shape"][1:])
    with pytest.raises(ERRORS, match=words):
        run_integers(**arguments)


def test_integers():
    for scales, words in (
        (jnp.ones(7, F32), "a scale for each output"),
        (jnp.ones(8, int), "dtype"),
    ):
        with pytest.raises(ERRORS, match=words):
            run_int8(scales)
    with pytest.raises(ERRORS, match="values of int8 expected"):
        run_int8(jnp.ones(8, F32), BLOCKS["values"].astype(jnp.uint8))
    with pytest.raises(ERRORS, match="do not fit each other"):
        run_int8(jnp.ones(8, F32), jnp.ones((2, 2, 4), jnp.int8))


def window(**changes):
    names = ("taps", "strides", "padding", "dilation")
    start = {"taps": (1, 1), "strides": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    return tuple(number for name in names for number in {**start, **changes}[name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "at least one output"),
        ({"n": -4}, "at least one output"),
        ({"n": 3}, "do not fit each other"),
        ({"n": 2**62}, "at least one output"),
        ({"window": window(strides=(0, 1))}, "strides and dilation start at 1"),
        ({"window": window(strides=(1, -1))}, "strides and dilation start at 1"),
        ({"window": window(taps=(-1, -1))}, "taps, strides"),
        ({"window": window(taps=(0, 1))}, "taps, strides"),
        ({"window": window(taps=(1, 2))}, "do not fit each other"),
        ({"window": window(dilation=(1, 0))}, "dilation start at 1"),
        ({"window": window(padding=(-1, 0))}, "padding at 0"),
        ({"window": window(taps=(1, 2**40))}, "too large"),
        ({"window": window(taps=(2**20, 2**20))}, "too large"),
        ({"window": window(taps=(2, 2), dilation=(2**23, 2**23))}, "far larger than the image"),
        ({"window": (1, 1, 1, 1)}, "four axes"),
        ({"shape": (2, 1, 5, 8)}, "as many images"),
        ({"shape": (1, 5, 8)}, "four axes"),
        ({"shape": (1, 1, 5, 20)}, "do not fit each other"),
        ({"x": jnp.ones((1, 1, 5, 6), jnp.float16)}, "float32 or bfloat16"),
        ({"values": jnp.ones((2, 3, 4), jnp.int32)}, "float32 or bfloat16"),
        ({"values": jnp.ones((2, 2, 4), F32)}, "do not fit each other"),
        ({"indices": BLOCKS["indices"].astype(jnp.int8)}, "unsigned indices"),
        ({"indices": BLOCKS["indices"].astype(jnp.bfloat16)}, "unsigned indices"),
        ({"indices": BLOCKS["indices"].astype(bool)}, "unsigned indices"),
        ({"indices": BLOCKS["indices"].astype(F32)}, "unsigned indices"),
        ({"indices": jnp.full((2, 3), 6, jnp.uint8)}, "index out of range"),
        ({"row_pointers": jnp.zeros(0, jnp.bfloat16)}, "int32"),
        ({"bias": jnp.zeros(8, jnp.bfloat16)}, "do not fit each other"),
        ({"bias": jnp.zeros(7, F32)}, "do not fit each other"),
    ],
)
def test_blocks(changes, words):
    with pytest.raises(ERRORS, match=words):
        run_blocks(**{**BLOCKS, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_pointers": jnp.array([0, 3, 6], jnp.bfloat16)}, "int32"),
        ({"row_pointers": jnp.array([0, 3, 6], jnp.uint32)}, "int32"),
        ({"row_pointers": jnp.array([0, 7, 6], jnp.int32)}, "descend"),
        ({"row_pointers": jnp.array([0, -1, 6], jnp.int32)}, "descend"),
        ({"row_pointers": jnp.array([0, 6], jnp.int32)}, "do not span"),
        ({"row_pointers": jnp.array([0, 3, 7], jnp.int32)}, "do not span"),
    ],
)
def test_rows_that_differ(changes, words):
    with pytest.raises(ERRORS, match=words):
        run_blocks(**{**LAYER, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"m": 0}, "groups of 2 to 32"),
        ({"m": -1}, "groups of 2 to 32"),
        ({"m": 2**40}, "groups of 2 to 32"),
        ({"m": 5}, "do not fit each other"),
        ({"shape": (6, 16)}, "do not fit each other"),
        ({"shape": (5, 32)}, "do not fit each other"),
        ({"shape": (5, 1, 16)}, "matrices"),
        ({"values": jnp.ones((2, 0, 16), F32)}, "groups of 2 to 32"),
        ({"values": jnp.ones((2, 4, 16), F32)}, "groups of 2 to 32"),
        ({"values": jnp.ones((2, 2, 8), F32)}, "multiple of 16"),
        ({"values": jnp.ones((2, 2, 16), jnp.float16)}, "float32 or bfloat16"),
        ({"codes": jnp.zeros((2, 16), jnp.uint8)}, "do not fit each other"),
        ({"codes": jnp.zeros((1, 16), jnp.int8)}, "dtype"),
        ({"codes": jnp.zeros((1, 16), jnp.bfloat16)}, "dtype"),
        ({"bias": jnp.zeros(16, jnp.bfloat16)}, "do not fit each other"),
        ({"bias": jnp.zeros(15, F32)}, "do not fit each other"),
    ],
)
def test_groups(changes, words):
    with pytest.raises(ERRORS, match=words):
        run_groups(**{**GROUPS, **changes})

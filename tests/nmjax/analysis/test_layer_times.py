"""The table of layers' times: what is in it, and that both sides compute the same."""

import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.__main__ import main
from nmjax.analysis import layer_times
from tests.nmjax.packed_weights import prune_and_pack

SHAPES = {"dense": (32, 16), "conv_line": (4, 8, 16), "conv": (3, 3, 16, 16)}


def packed_layers(pattern):
    params = {
        name: {
            "kernel": jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32),
            "bias": jnp.zeros(shape[-1]),
        }
        for name, shape in SHAPES.items()
    }
    return prune_and_pack(params, nmjax.make_plan(params, pattern))


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_both_sides_compute_the_same(pattern):
    for layer in packed_layers(pattern).values():
        leaf = layer["kernel"]
        shape = layer_times._input_shape(leaf, batch=2, side=5)
        x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
        product = nmjax.packed_conv if len(shape) > 2 else nmjax.packed_matmul
        dense = layer_times._dense(leaf, x, nmjax.unpack(layer)["kernel"])
        np.testing.assert_allclose(dense, product(x, leaf), rtol=1e-5, atol=1e-5)


def test_rows(tmp_path):
    nmjax.save_packed(tmp_path / "a.safetensors", packed_layers("1x4@0.5"))
    rows = layer_times.measure(tmp_path / "a.safetensors", 2, 5)
    assert {row["layer"][0] for row in rows} == {f"{name}/kernel" for name in SHAPES}
    conv = next(row["layer"] for row in rows if row["layer"][0] == "conv/kernel")
    assert conv[1:3] == ("1x4@0.5", "conv 2x5x5x16 by 3x3x16x16")
    assert all(row["dense"] > 0 and row["packed"] > 0 for row in rows)


def test_what_is_multiplied_dense_takes_as_long_as_that(tmp_path):
    nmjax.save_packed(tmp_path / "a.safetensors", packed_layers("3:4"))
    for row in layer_times.measure(tmp_path / "a.safetensors", 2, 5):
        assert row["layer"][-1] == "xla"
        assert row["dense"] == row["packed"]


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5", "1x4@0.5/layer"])
def test_of_a_stack_one_layer_is_measured(tmp_path, pattern):
    params = {"kernel": jnp.ones((3, 32, 16)), "bias": jnp.zeros((3, 16))}
    packed = prune_and_pack(params, nmjax.make_plan(params, pattern))
    nmjax.save_packed(tmp_path / "a.safetensors", packed)
    [row] = layer_times.measure(tmp_path / "a.safetensors", 2, 5)
    assert row["layer"][2] == "matmul 2x32 by 32x16"


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    nmjax.save_packed(tmp_path / "a.safetensors", packed_layers("1x4@0.5"))
    assert main(["bench", str(tmp_path / "a.safetensors"), "--threads", "1,2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("line/kernel") == 2
    assert "2 threads over 1: packed" in printed


def test_errors(tmp_path, capsys):
    nmjax.save_packed(tmp_path / "dense.safetensors", {"bias": jnp.ones(3)})
    assert main(["bench", str(tmp_path / "dense.safetensors")]) == 1
    assert "none of its 1 leaves is packed" in capsys.readouterr().err
    nmjax.save_packed(tmp_path / "a.safetensors", packed_layers("2:4"))
    assert main(["bench", str(tmp_path / "a.safetensors"), "--threads", "1000"]) == 1
    assert "asked for 1000 threads" in capsys.readouterr().err

"""The tests check the shapes in the library's signatures, and users do not pay for it."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import nmjax
from nmjax import ste
from nmjax.masks import scores

W = jnp.arange(12.0).reshape(4, 3)


def test_a_wrong_argument_is_caught():
    kept = np.ones((1, 3), bool)
    with pytest.raises(TypeCheckError, match=r"apply_mask.*(\n.*)*mask: .*Bool"):
        ste.apply_mask(W, kept)  # It would broadcast.


def test_a_wrong_dtype_is_caught():
    with pytest.raises(TypeCheckError, match="apply_mask"):
        ste.apply_mask(W, jnp.ones((4, 3), int))


def test_a_wrong_result_is_caught(monkeypatch):
    monkeypatch.setattr(jnp, "abs", lambda w: w[:1])
    with pytest.raises(
        TypeCheckError, match=r"the return value of nmjax\.masks\.scores\.magnitude"
    ):
        scores.magnitude(W)


def test_the_librarys_own_errors_come_first():
    with pytest.raises(ValueError, match="a mask needs one entry per weight"):
        nmjax.prune_ste(W, jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match="one number per weight"):
        scores.score_weights(W, lambda w: w[0])


def test_users_load_neither_jaxtyping_nor_chex():
    code = "import nmjax, nmjax.methods, sys; print(*sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "nmjax" in loaded
    assert not loaded & {"jaxtyping", "beartype", "chex"}

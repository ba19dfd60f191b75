"""States that come back from disk as they went."""

import signal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.checkpoints import Checkpoints


class State(NamedTuple):
    params: Any
    opt_state: Any
    masks: Any
    nothing: Any
    step: Any


def make_state(size=4):
    params = {"layer": {"kernel": jnp.linspace(0, 1, size * 3).reshape(size, 3)}}
    tx = optax.chain(optax.identity(), optax.adamw(lambda step: 0.1))
    masks = {"layer/kernel": params["layer"]["kernel"] > 0.5}
    half = {"half": jnp.ones(3, jnp.bfloat16)}
    return State(params, tx.init(params), masks, ((), half), jnp.int32(7))


def assert_identical(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.latest() is None
    store.save(3, make_state())
    store.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest() == 3
    restored = again.restore(3, make_state)
    assert_identical(restored, make_state())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_only_the_last_few_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for epoch in range(5):
        store.save(epoch, {"epoch": jnp.int32(epoch)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    assert store.restore(3, lambda: {"epoch": jnp.int32(0)}) == {"epoch": 3}


def test_a_saved_state_does_not_change_with_the_memory_it_came_from(tmp_path):
    store = Checkpoints(tmp_path)
    state = {"weights": jnp.arange(1000.0)}
    store.save(0, state)
    jax.jit(lambda s: jax.tree.map(lambda w: w + 1, s), donate_argnums=0)(state)
    restored = store.restore(0, lambda: {"weights": jnp.zeros(1000)})
    np.testing.assert_array_equal(restored["weights"], np.arange(1000.0))


@pytest.mark.parametrize(
    "other", [lambda: make_state(size=5), lambda: make_state()._replace(masks={})]
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, other):
    store = Checkpoints(tmp_path)
    store.save(1, make_state())
    with pytest.raises(ValueError, match=r"the checkpoint .*/1 does not fit this run"):
        store.restore(1, other)


def test_ctrl_c_waits_for_a_save_to_end(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    save = store._manager.save

    def save_and_be_interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(store._manager, "save", save_and_be_interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        store.save(1, make_state())
    assert signal.getsignal(signal.SIGINT) is before
    assert_identical(store.restore(1, make_state), make_state())

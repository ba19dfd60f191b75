"""The step that the benchmark times is a training step, and computes each mask once."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.train_step import (
    CASES,
    METHODS,
    make_call,
    make_training,
    mask_computations,
)

pytestmark = pytest.mark.optimized

MLP, TRANSFORMER = "MLP 3x1024, batch 128", "Transformer block 512, 16x128 tokens"


@pytest.mark.parametrize(
    ("case", "pattern"),
    [(MLP, "2:4"), (MLP, "1:16"), pytest.param(TRANSFORMER, "1:16", marks=pytest.mark.slow)],
)
def test_forward_and_optimizer_share_one_mask(case, pattern):
    module, shape = CASES[case]
    x = jnp.ones((8, *shape[1:]))
    made = {method: make_training(module, x, pattern, method) for method in METHODS}
    leaves = len(made["dense"].plan)
    counts = {method: mask_computations(training) for method, training in made.items()}
    assert counts == {"dense": 0, "ste": leaves, "sr_ste": leaves}


def test_steps_go_on_from_each_other():
    module, _ = CASES[MLP]
    call = make_call(make_training(module, jnp.ones((8, 64)), "2:4", "sr_ste"))
    # Copies, since the next step reuses the memory.
    first, second = (jax.tree.map(jnp.copy, call())[0] for _ in range(2))
    assert not jnp.array_equal(first["Dense_0"]["kernel"], second["Dense_0"]["kernel"])

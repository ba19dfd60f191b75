"""The benchmark of training on several devices, small; no time is asserted."""

import jax
import pytest

from experiments.benchmarks.scaling import make_task, measure_checkpoints, measure_steps

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def task():
    return make_task(width=32, batch_size=16)


@pytest.mark.parametrize("preset", ["fsdp", pytest.param("data", marks=pytest.mark.slow)])
def test_a_sparse_step_adds_no_collective(preset):
    (row,) = measure_steps(32, 4, pattern="2:4", counts=(4,), preset=preset, rounds=1)
    assert row["collectives"] == row["dense collectives"] > 0
    assert row["seconds"] > 0


@pytest.mark.slow
def test_checkpoints_grow_by_bits(task):
    rows = {
        row["saved"]: row for row in measure_checkpoints(task, pattern="2:4", devices=4, rounds=1)
    }
    assert rows["dense, no masks"]["of dense"] == 1
    # Small as they are, names and shapes are most of these files.
    assert rows["one-shot"]["bytes"] < 2 * rows["dense, no masks"]["bytes"]
    assert all(row["restored seconds"] > 0 for row in rows.values())
    assert jax.device_count() == 8

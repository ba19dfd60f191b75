"""The benchmarks of pruning with data, on small layers and a small corpus."""

from itertools import islice

import jax
import numpy as np
import pytest

from experiments.benchmarks.pruned_decoder import from_scratch_rows, pruned_rows
from experiments.benchmarks.pruning_time import METHODS, layer_rows, statistics_rows
from experiments.data.library_sources import Sources
from experiments.tasks import python_bytes


def test_rows_of_the_networks_that_trained_sparse():
    rows = list(from_scratch_rows("1:4"))
    assert [row["method"].split()[-1] for row in rows] == ["dense", "ste", "sr_ste"]
    assert rows[0]["bits per byte"] < rows[2]["bits per byte"]
    assert all(len(row["seeds"]) == 4 for row in rows)


@pytest.mark.slow
def test_a_better_method_leaves_a_smaller_error():
    errors = {row["method"]: row["relative error"] for row in layer_rows(64)}
    assert tuple(errors) == METHODS
    assert errors["alps"] < errors["sparse_gpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.slow
def test_statistics_are_timed_beside_the_forward_pass():
    rows = statistics_rows("decoder_tiny", 16)
    assert [row["what"] for row in rows] == ["forward", "mean_square", "gram"]
    assert rows[0]["over forward"] == 1
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_a_decoder_is_pruned_by_each_method():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, 4096, dtype=np.uint8) for _ in range(2))
    sources = Sources(train, test, 1, 1, ())
    task = python_bytes.task(sources=sources, portion=python_bytes.Portion(16, 16, 8))
    networks = [task.init(jax.random.key(seed))["params"] for seed in range(2)]
    dense, magnitude = islice(pruned_rows(task, networks, "1:4"), 2)
    # Networks that have learned nothing know nothing about bytes.
    assert dense["bits per byte"] > 7.5
    assert magnitude["method"] == "magnitude"
    assert len(magnitude["seeds"]) == 2

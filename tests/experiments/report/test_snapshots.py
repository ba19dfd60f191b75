"""What is kept for the pictures, against the trained state."""

import numpy as np
import pytest

from experiments.report.snapshots import block_masks, example_images, kernel_shapes
from experiments.training.loop import train
from experiments.training.methods import METHODS
from experiments.training.step import Job, plan_of
from tests.experiments.tiny import STEPS, tiny_task


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_blocks_are_those_of_the_first_seed_in_the_last_of_the_largest_layers(seeds):
    task = tiny_task()
    plan = plan_of(task, "1x4@0.75")
    job = Job(task, plan, METHODS["subp"].build(plan, task.recipe, STEPS))
    *_, report = train(job, seeds=seeds)
    found = block_masks(job, report.state)
    assert found["layer"] == "middle/kernel"
    mask = np.asarray(report.state.train.sparse.masks["middle/kernel"]).reshape(-1, 16, 16)[0]
    rows = [[int(digit) for digit in row] for row in found["rows"]]
    np.testing.assert_array_equal(np.repeat(rows, 4, axis=0), mask.T)
    assert {sum(row) for row in rows} == {4}


def test_networks_without_3x3_kernels_have_no_shapes_to_draw():
    task = tiny_task(epochs=1)
    plan = plan_of(task, "2:4")
    job = Job(task, plan, METHODS["ste"].build(plan, task.recipe, STEPS))
    *_, report = train(job)
    assert kernel_shapes(job, report.state) == {}


def test_examples_are_the_first_test_images():
    task = tiny_task()
    found, batch = example_images(task, 3), next(iter(task.eval_batches()))
    np.testing.assert_array_equal(found["images"], batch["image"][:3, :, :, 0])
    np.testing.assert_array_equal(found["labels"], batch["label"][:3])

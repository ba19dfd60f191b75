"""Flags become the tasks, models and recipes that they name."""

import pytest

from experiments.training.flags import Flags, make_job, make_run_placement, place_job, strength


def test_a_language_model_with_a_changed_recipe():
    flags = Flags(
        task="python_bytes",
        method="sr_ste_decoupled",
        pattern="1:8",
        epochs=3,
        clip=0.5,
        lambda_decoupled=0.7,
        schedule="inverse_sqrt",
        dtype="bfloat16",
    )
    job = make_job(flags)
    recipe = job.task.recipe
    assert (recipe.epochs, recipe.clip, recipe.schedule) == (3, 0.5, "inverse_sqrt")
    assert recipe.optimizer == "adamw"
    assert strength(flags, recipe) == 0.7
    assert "bytes" in job.task.notes[0]


@pytest.mark.parametrize("task", ["python_bytes", "number_names"])
def test_a_model_that_does_not_fit_the_task_is_refused(task):
    with pytest.raises(ValueError, match="no model named 'resnet18'; choose from"):
        make_job(Flags(task=task, model="resnet18"))


def test_a_term_that_the_method_lacks_is_refused():
    with pytest.raises(ValueError, match="'ste' has no sparse-refined term"):
        make_job(Flags(task="python_bytes", method="ste", lambda_decoupled=0.1))


@pytest.mark.parametrize("axis_types", ["auto", "explicit"])
def test_the_placed_plan_knows_how_the_weights_lie(axis_types):
    flags = Flags(
        task="digits",
        batch_size=24,
        mesh="data=2,model=4",
        layout="fsdp",
        axis_types=axis_types,
    )
    job = make_job(flags)
    placed = place_job(flags, job, make_run_placement(flags, job))
    for name, leaf in placed.plan.items():
        # The types of arrays say how they lie on explicit axes.
        wanted = (None, "data") if axis_types == "auto" else None
        spec = leaf.sharding and leaf.sharding.spec[-2:]
        assert spec == wanted, name
        assert job.plan[name].sharding is None
    assert place_job(flags, job, make_run_placement(Flags(task="digits"), job)) is job

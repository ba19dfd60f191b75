"""Options change the recipe and say what a task offers."""

import dataclasses

import pytest

from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Recipe


@offers("small", "large", dtypes=("float32", "bfloat16"))
def task(options=DEFAULTS, *, width=3):
    """A task that is just what it was given."""
    return options, width


@offers("narrow", "wide", default="wide")
def in_float32(options=DEFAULTS):
    return options


def test_every_number_of_a_recipe_can_be_changed():
    fields = {field.name: field for field in dataclasses.fields(Options)}
    for entry in dataclasses.fields(Recipe):
        assert fields[entry.name].type == f"{entry.type} | None"
        assert fields[entry.name].default is None


def test_what_is_given_takes_the_place_of_the_recipes_own():
    recipe = Recipe(epochs=7, clip=1.0, decay_vectors=True)
    assert DEFAULTS.changed(recipe) == recipe
    changed = Options(epochs=3, clip=0.0, decay_vectors=False).changed(recipe)
    assert changed == dataclasses.replace(recipe, epochs=3, clip=0.0, decay_vectors=False)


def test_the_default_model_is_the_first_or_the_one_that_is_named():
    assert task()[0].model == task.default_model == "small"
    assert in_float32().model == in_float32.default_model == "wide"
    assert task(Options(model="large"), width=5) == (Options(model="large"), 5)
    assert task.__doc__ == "A task that is just what it was given."


def test_what_a_task_does_not_offer_is_an_error():
    with pytest.raises(ValueError, match="no model named 'huge'; choose from small, large"):
        task(Options(model="huge"))
    with pytest.raises(ValueError, match="wide computes in float32, got bfloat16"):
        in_float32(Options(dtype="bfloat16"))


@pytest.mark.parametrize(("pattern", "blocks"), [("2:4", False), ("1x4@0.5", True)])
def test_blocks_are_recognized(pattern, blocks):
    assert Options(pattern=pattern).for_blocks == blocks


def test_only_tasks_that_can_hold_data_out_take_validation():
    @offers("small", validation=True)
    def splits(options=DEFAULTS):
        return options.identity

    assert splits(Options(validation=True)) == (("split", "validation"),)
    assert splits() == ()
    with pytest.raises(ValueError, match="holds no training data out: drop --validation"):
        task(Options(validation=True))

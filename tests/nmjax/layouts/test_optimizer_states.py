"""States of Optax's optimizers, alone and in whole training states."""

import jax
import jax.numpy as jnp
import optax
import pytest

from nmjax.layouts import Axes, layouts, optimizer_leaves
from nmjax.trees.leaves import named_leaves

PARAMS = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "amsgrad": optax.amsgrad(1e-3),
    "lion": optax.lion(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(1e-3),
    "adadelta": optax.adadelta(1e-3),
    "chain": optax.chain(optax.clip(1.0), optax.adam(1e-3)),
    "scale alone": optax.scale_by_adam(),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 2),
    "hyperparameters": optax.inject_hyperparams(optax.adamw)(1e-3),
    "labels": optax.multi_transform(
        {"all": optax.adam(1e-3)}, lambda params: jax.tree.map(lambda _: "all", params)
    ),
}


def outcomes(tree):
    return layouts({name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_alone(kind):
    found = outcomes(OPTIMIZERS[kind].init(PARAMS))
    matrices = {name: outcome for name, outcome in found.items() if name.endswith("kernel")}
    assert matrices
    assert set(matrices.values()) == {"optimizer state"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("key", ["opt", "optimizer", "opt_state", "tx"])
@pytest.mark.parametrize("variables", [PARAMS, {"params": PARAMS}])
def test_states_beside_params(kind, key, variables):
    found = outcomes({"params": variables, key: OPTIMIZERS[kind].init(variables)})
    planned = [name for name, outcome in found.items() if isinstance(outcome, Axes)]
    assert planned == ["params/a/kernel" if variables is PARAMS else "params/params/a/kernel"]
    assert "optimizer state" in found.values()


def test_any_state_called_opt_beside_params():
    names = ["x/params/a/kernel", "x/opt/step/a/kernel", "opt/decoder/kernel"]
    assert optimizer_leaves(names) == {"x/opt/step/a/kernel"}


@pytest.mark.parametrize(
    "names",
    [
        ["layers/0/mu/kernel", "layers/0/log_var/kernel"],
        ["layers/0/mu/kernel"],
        ["mu/kernel", "nu/kernel"],
        ["0/nu/kernel", "0/bias"],
        ["heads/v/kernel"],
        ["opt/decoder/layers/0/fc1/kernel"],
    ],
)
def test_layers_called_like_moments(names):
    assert optimizer_leaves(names) == set()


def test_states_of_other_libraries():
    names = ["params.w", "optimizer.state.0.exp_avg", "optim/x/y", "optimizer_2/kernel"]
    assert optimizer_leaves(names) == set(names[1:3])


def test_boxes_of_nnx():
    names = ["0/count/value", "0/mu/a/kernel/value"]
    assert optimizer_leaves(names) == set(names)

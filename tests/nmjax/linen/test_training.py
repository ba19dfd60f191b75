"""Sparse linen modules: exactly the explicit way, in every place where a module can stand.

The explicit way is what the wrapped module must equal bit for bit: `nmjax.sparsify` on the
parameters, then the dense module's `apply`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import nmjax
from nmjax import linen

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 8), jnp.float32)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Network(nn.Module):
    """Several collections, random numbers, a state that moves, and layers of unlucky names."""

    width: int = 16
    dropout: float = 0.5

    def setup(self):
        self.dense = nn.Dense(self.width)
        self.plan = nn.Dense(self.width)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(4)

    def encode(self, x, train=False):
        x = nn.relu(self.norm(self.dense(x), use_running_average=not train))
        self.sow("intermediates", "encoded", x)
        return self.drop(x, deterministic=not train)

    def __call__(self, x, train=False):
        return self.head(nn.relu(self.plan(self.encode(x, train))))

    @property
    def outputs(self):
        return 4

    @staticmethod
    def double(x):
        return 2 * x

    @nn.nowrap
    def width_of(self, factor):
        return self.width * factor


VARIABLES = Network().init(KEY, X)
PLAN = nmjax.make_plan(VARIABLES["params"], "2:4", exclude="head")
SPARSE = linen.sparsify(Network(), PLAN)


def explicit(module, plan, lambda_w=None):
    """`module.apply` on sparse parameters, made the explicit way."""

    def apply(variables, *args, **kwargs):
        params = nmjax.sparsify(variables["params"], plan, lambda_w=lambda_w)
        return module.apply({**variables, "params": params}, *args, **kwargs)

    return apply


# The same module from outside


def test_init_gives_the_same_tree_with_the_same_values():
    assert_same(SPARSE.init(KEY, X), VARIABLES)
    assert_same(SPARSE.init(KEY, X, method="encode"), Network().init(KEY, X, method="encode"))
    output, variables = SPARSE.init_with_output(KEY, X)
    assert_same((output, variables), Network().init_with_output(KEY, X))


def test_fields_properties_and_helpers_are_those_of_the_dense_module():
    assert (SPARSE.width, SPARSE.dropout, SPARSE.outputs) == (16, 0.5, 4)
    assert SPARSE.double(3) == 6
    assert SPARSE.width_of(2) == 32
    assert isinstance(SPARSE, Network)
    assert type(SPARSE).__name__ == "SparseNetwork"
    assert "width = 16" in repr(SPARSE)


def test_modules_with_rules_can_be_hashed_and_cloned():
    sparse = linen.sparsify(Network(), "2:4", rules={"head": "1:4"}, exclude=["dense"])
    assert hash(sparse) == hash(sparse.clone())
    assert sparse.clone() == sparse
    assert_same(sparse.clone().apply(VARIABLES, X), sparse.apply(VARIABLES, X))
    assert sparse.clone(width=8).init(KEY, X)["params"]["plan"]["kernel"].shape == (8, 8)


# The explicit way, exactly


def test_outputs_are_those_of_sparse_parameters():
    result = SPARSE.apply(VARIABLES, X)
    assert_same(result, explicit(Network(), PLAN)(VARIABLES, X))
    assert (result != Network().apply(VARIABLES, X)).any()


@pytest.mark.parametrize("lambda_w", [None, 0.3])
def test_a_training_pass_with_everything_that_moves(lambda_w):
    sparse = linen.sparsify(Network(), PLAN, lambda_w=lambda_w)

    def loss(params, apply):
        output, updates = apply(
            {**VARIABLES, "params": params},
            X,
            train=True,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.key(2)},
        )
        return jnp.sum(output**2), (output, updates)

    pass_of = jax.value_and_grad(loss, has_aux=True)
    ours = pass_of(VARIABLES["params"], sparse.apply)
    expected = pass_of(VARIABLES["params"], explicit(Network(), PLAN, lambda_w))
    assert_same(ours, expected)
    (_, (_, updates)), _ = ours
    assert updates["intermediates"].keys() == {"encoded"}
    moved = updates["batch_stats"]["norm"]["mean"] != VARIABLES["batch_stats"]["norm"]["mean"]
    assert moved.any()


def test_lambda_adds_its_term_to_the_gradient_of_pruned_weights():
    def gradient(lambda_w):
        apply = linen.sparsify(Network(), PLAN, lambda_w=lambda_w).apply
        return jax.grad(lambda p: apply({**VARIABLES, "params": p}, X).sum())(VARIABLES["params"])

    masks = nmjax.compute_masks(VARIABLES["params"], PLAN)
    difference = jax.tree.map(jnp.subtract, gradient(0.5), gradient(None))
    for layer in ("dense", "plan"):
        w, mask = VARIABLES["params"][layer]["kernel"], masks[f"{layer}/kernel"]
        np.testing.assert_allclose(
            difference[layer]["kernel"], jnp.where(mask, 0, 0.5 * w), atol=1e-5
        )
    assert not difference["head"]["kernel"].any()


def test_a_traced_lambda_does_not_compile_again():
    traces = []

    @jax.jit
    def gradient(params, lambda_w):
        traces.append(lambda_w)
        apply = linen.sparsify(Network(), PLAN, lambda_w=lambda_w).apply
        return jax.grad(lambda p: apply({**VARIABLES, "params": p}, X).sum())(params)

    small, large = gradient(VARIABLES["params"], 0.1), gradient(VARIABLES["params"], 0.9)
    assert len(traces) == 1
    assert (small["dense"]["kernel"] != large["dense"]["kernel"]).any()


@pytest.mark.parametrize(
    "method", ["encode", Network.encode, Network().encode, lambda m, x: m.encode(x)]
)
def test_other_methods(method):
    dense = method if callable(method) else Network.encode
    assert_same(
        SPARSE.apply(VARIABLES, X, method=method),
        explicit(Network(), PLAN)(VARIABLES, X, method=dense),
    )
    assert (
        SPARSE.apply(VARIABLES, X, method=method) != Network().apply(VARIABLES, X, method=dense)
    ).any()


def test_methods_of_a_bound_module():
    bound = SPARSE.bind(VARIABLES)
    assert_same(bound(X), SPARSE.apply(VARIABLES, X))
    assert_same(bound.encode(X), SPARSE.apply(VARIABLES, X, method="encode"))


def test_a_module_without_call():
    class Autoencoder(nn.Module):
        def setup(self):
            self.inner, self.outer = nn.Dense(4), nn.Dense(8)

        def encode(self, x):
            return self.inner(x)

        def decode(self, x):
            return self.outer(self.encode(x))

    sparse = linen.sparsify(Autoencoder(), "2:4")
    variables = sparse.init(KEY, X, method="decode")
    plan = nmjax.make_plan(variables["params"], "2:4")
    for method in ("encode", "decode"):
        expected = explicit(Autoencoder(), plan)(variables, X, method=method)
        assert_same(sparse.apply(variables, X, method=method), expected)


def test_a_method_that_calls_another_one_prunes_once():
    calls = []

    def score(w):
        calls.append(w.shape)
        return jnp.abs(w)

    sparse = linen.sparsify(Network(), "2:4", score=score, include="dense")
    sparse.apply(VARIABLES, X)  # __call__ calls encode.
    once = len(calls)
    sparse.apply(VARIABLES, X, method="encode")
    assert len(calls) == 2 * once


# Ways to say what is sparse


def test_a_pattern_with_a_selection_is_the_plan_made_from_it():
    for pattern in ("2:4", nmjax.NM(2, 4)):
        sparse = linen.sparsify(Network(), pattern, exclude="head")
        assert_same(sparse.apply(VARIABLES, X), SPARSE.apply(VARIABLES, X))
    mixed = linen.sparsify(
        Network(), "2:4", rules={"head": "1:8"}, include=("dense", "head"), on_indivisible="dense"
    )
    plan = nmjax.make_plan(
        VARIABLES["params"], "2:4", rules={"head": "1:8"}, include=("dense", "head")
    )
    assert_same(mixed.apply(VARIABLES, X), explicit(Network(), plan)(VARIABLES, X))


@pytest.mark.parametrize("module", [nn.Dense, 3, None, lambda x: x])
def test_what_is_no_module(module):
    with pytest.raises(TypeError, match="expected a linen module instance"):
        linen.sparsify(module, "2:4")


def test_a_selection_beside_a_plan():
    with pytest.raises(TypeError, match=r"\['exclude'\] are arguments of nmjax.make_plan"):
        linen.sparsify(Network(), PLAN, exclude="head")


def test_a_selection_that_make_plan_does_not_know():
    with pytest.raises(TypeError, match="unexpected keyword argument 'exclued'"):
        linen.sparsify(Network(), "2:4", exclued="head")


def test_a_pattern_that_does_not_parse():
    with pytest.raises(ValueError, match="cannot read"):
        linen.sparsify(Network(), "2-4")


def test_parameters_that_do_not_fit():
    sparse = linen.sparsify(Network(width=32), PLAN)
    with pytest.raises(ValueError, match="do not fit the plan"):
        sparse.apply(sparse.init(KEY, X), X)
    with pytest.raises(ValueError, match="do not divide into whole groups"):
        linen.sparsify(Network(), "2:3").apply(VARIABLES, X)


def test_a_module_without_parameters():
    sparse = linen.sparsify(nn.Dropout(0.5, deterministic=True), "2:4")
    with pytest.raises(ValueError, match="Dropout has no parameters of its own"):
        sparse.apply({}, X)


# Training


@pytest.mark.parametrize("sparse", [True, False])
def test_an_unchanged_training_loop(sparse):
    """One loop for both; the sparse one ends in a network that 2:4 pruning does not change."""
    model = Network(dropout=0.1)
    model = linen.sparsify(model, "2:4", lambda_w=1e-3) if sparse else model
    y = jnp.arange(6) % 4

    # From here on, a training loop as Flax documents it.
    class State(TrainState):
        batch_stats: dict

    variables = model.init(KEY, X)
    state = State.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(0.05, momentum=0.9),
    )
    traces = []

    @jax.jit
    def step(state, key):
        traces.append(key)

        def loss_fn(params):
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                X,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), loss

    losses = []
    for i in range(60):
        state, loss = step(state, jax.random.key(i))
        losses.append(float(loss))
    assert len(traces) == 1
    assert losses[-1] < 0.2 * losses[0]

    def logits_of(params):
        return Network().apply({"params": params, "batch_stats": state.batch_stats}, X)

    trained = model.apply({"params": state.params, "batch_stats": state.batch_stats}, X)
    pruned = nmjax.prune(state.params, nmjax.make_plan(state.params, "2:4"))
    assert bool((trained == logits_of(pruned)).all()) == sparse
    assert bool((trained == logits_of(state.params)).all()) != sparse


def test_jit_compiles_once():
    traces = []

    @jax.jit
    def forward(variables, x):
        traces.append(x)
        return SPARSE.apply(variables, x)

    for i in range(3):
        forward(jax.tree.map(lambda v, i=i: v + i, VARIABLES), X)
    assert len(traces) == 1


def test_vmap_around_apply_trains_several_seeds_at_once():
    keys = jax.random.split(KEY, 3)
    seeds = jax.vmap(lambda key: SPARSE.init(key, X))(keys)
    results = jax.vmap(lambda variables: SPARSE.apply(variables, X))(seeds)
    for i in range(3):
        alone = SPARSE.apply(jax.tree.map(lambda v, i=i: v[i], seeds), X)
        np.testing.assert_allclose(results[i], alone, rtol=1e-5, atol=1e-6)

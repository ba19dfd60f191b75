"""qwix quantizes sparse networks of linen and NNX: zeros stay zero, and the pattern exact."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from nmjax import linen
from nmjax.trees.leaves import named_leaves

qwix = pytest.importorskip("qwix")
pytestmark = pytest.mark.slow

X = jax.random.normal(jax.random.key(0), (8, 4, 4, 8))
Y = jax.random.normal(jax.random.key(1), (8, 4))
PATTERNS = ["2:4", "1x4@0.5"]
RULES = {
    "int8": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
    "weights": {"weight_qtype": jnp.int8},
    "int4": {"weight_qtype": jnp.int4, "act_qtype": jnp.int8},
    # Asymmetric: the zero of the integers is not that of the weights.
    "minmax": {"weight_qtype": jnp.int8, "weight_calibration_method": "minmax"},
}


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x)).mean((1, 2))
        x = nn.relu(nn.DenseGeneral((4, 8), name="heads")(x))
        return nn.DenseGeneral(4, axis=(-2, -1), name="out")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.dense = nnx.Linear(16, 32, rngs=rngs)
        self.out = nnx.Einsum("bi,io->bo", (32, 4), (4,), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(self.dropout(nnx.relu(self.dense(x))))


def rules(name):
    # qwix convolves only if weights and activations have the same type.
    return [
        qwix.QuantizationRule(module_path="conv", **RULES["int8"]),
        qwix.QuantizationRule(module_path=".*", **RULES[name]),
    ]


def zeros_and_pattern_hold(quantized, pruned, plan):
    """A quantized weight is zero wherever the pruned one is, and sparse under the plan."""
    dense = {
        name: np.asarray(qwix.dequantize(array).reshape(pruned[name].shape))
        for name, array in quantized.items()
    }
    assert dense.keys() == plan.keys()
    for name, weight in dense.items():
        assert (weight[np.asarray(pruned[name]) == 0] == 0).all(), name
        assert np.abs(weight).max() > 0
    nmjax.check_sparse(dense, plan)


def trained(step, *state, steps=20):
    losses = []
    for _ in range(steps):
        *state, loss = step(*state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return state


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", RULES)
def test_linen(rule, pattern):
    module = LinenNet()
    training = qwix.quantize_model(module, qwix.QtProvider(rules(rule)))
    params = module.init(jax.random.key(2), X)["params"]
    plan = linen.make_plan(module, pattern, X)
    tx = optax.chain(nmjax.add_sparse_refined(plan), optax.adam(1e-2))

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            return ((training.apply({"params": nmjax.sparsify(params, plan)}, X) - Y) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, _ = trained(step, params, tx.init(params))
    pruned = nmjax.prune(params, plan)
    evaluated = training.apply({"params": nmjax.sparsify(params, plan)}, X)
    serving = qwix.quantize_model(module, qwix.PtqProvider(rules(rule)))
    shapes = jax.eval_shape(serving.init, jax.random.key(0), X)["params"]
    quantized = qwix.quantize_params(pruned, shapes)
    arrays = {name: at(quantized, name).array for name in plan}
    zeros_and_pattern_hold(arrays, {name: at(pruned, name) for name in plan}, plan)
    served = serving.apply({"params": quantized}, X)
    np.testing.assert_allclose(served, evaluated, rtol=1e-4, atol=1e-4)
    # Quantization did happen: the network of floating-point weights has other outputs.
    assert np.abs(module.apply({"params": pruned}, X) - evaluated).max() > 1e-4


def test_a_linen_module_that_makes_its_own_weights_sparse():
    """nmjax.linen.sparsify outside qwix, which replaces the methods of the class."""
    module = LinenNet()
    quantized = qwix.quantize_model(module, qwix.QtProvider(rules("int8")))
    params = module.init(jax.random.key(2), X)["params"]
    plan = linen.make_plan(module, "2:4", X)
    expected = quantized.apply({"params": nmjax.prune(params, plan)}, X)
    both = qwix.quantize_model(linen.sparsify(module, plan), qwix.QtProvider(rules("int8")))
    np.testing.assert_allclose(both.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", RULES)
def test_nnx(rule, pattern):
    model = NnxNet(nnx.Rngs(0))
    training = qwix.quantize_model(model, qwix.QtProvider(rules(rule)), X)
    count = int(training.dropout.rngs.count[...])
    plan = nmjax.nnx.make_plan(model, pattern, inputs=(X,))
    optimizer = nnx.Optimizer(training, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return ((nmjax.nnx.sparsify(model, plan)(X) - Y) ** 2).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    trained(lambda: (step(training, optimizer),))
    assert int(training.dropout.rngs.count[...]) == count + 20
    assert float(jnp.abs(training.norm.mean[...]).max()) > 0
    training.eval()
    evaluated = nmjax.nnx.sparsify(training, plan)(X)
    nmjax.nnx.prune(training, plan)
    nnx.update(model, nnx.state(training, (nnx.Param, nnx.BatchStat)))
    model.eval()
    pruned = named_leaves(nnx.state(model, nnx.Param))
    serving = qwix.quantize_model(model, qwix.PtqProvider(rules(rule)), X)
    arrays = {name: read(at_path(serving, name).array) for name in plan}
    zeros_and_pattern_hold(arrays, pruned, plan)
    np.testing.assert_allclose(serving(X), evaluated, rtol=1e-4, atol=1e-4)
    assert np.abs(model(X) - evaluated).max() > 1e-4


@pytest.mark.parametrize(("n", "m", "stride"), [(2, 4, 16), (1, 8, 4), (2, 4, 1)])
def test_masks_are_those_of_qwix(n, m, stride):
    sparsity = pytest.importorskip("qwix._src.core.sparsity")
    w = jnp.asarray(np.random.default_rng(0).integers(-5, 6, (2 * m * stride, 6)), "float32")
    mask = sparsity.get_sparsity_mask(w, n, m, order="C", offset=stride)
    np.testing.assert_array_equal(nmjax.nm_mask(w, n, m, stride=stride), mask)


def test_packed_products_would_not_be_quantized():
    model = NnxNet(nnx.Rngs(0))
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(X,))
    nmjax.nnx.prune(model, plan)
    nmjax.nnx.pack(model, plan)
    quantized = qwix.quantize_model(model, qwix.QtProvider(rules("int8")), X)
    with pytest.raises(TypeError, match="NnxNet is quantized by qwix"):
        nmjax.nnx.pack(quantized, plan)


def at(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


def at_path(module, name):
    for key in name.split("/"):
        module = getattr(module, key)
    return module


def read(array):
    """A quantized array of NNX, without the variables around its parts."""
    return jax.tree.map(lambda x: x[...], array, is_leaf=lambda x: isinstance(x, nnx.Variable))

"""The Transformers: parameter counts, what a position may see, decoding token by token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from experiments.models.text.transformer import (
    DECODERS,
    TRANSFORMERS,
    Decoder,
    Size,
    Transformer,
)

TINY = Size(16, 32, 2, 2)
RNG = np.random.default_rng(0)
SOURCE = np.array([[5, 6, 7, 4, 0, 0], [4, 8, 0, 0, 0, 0]], np.int32)
TARGET = RNG.integers(3, 9, (2, 5)).astype(np.int32)


def shapes(model, *tokens):
    return jax.eval_shape(model.init, jax.random.key(0), *tokens)["params"]


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def translator():
    model = Transformer(TINY, 9)
    variables = jax.jit(model.init)(jax.random.key(0), SOURCE, TARGET)
    return model, variables, jax.jit(model.apply)


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(TINY, 9)
    variables = jax.jit(model.init)(jax.random.key(0), TARGET)
    return model, variables, jax.jit(model.apply)


def test_the_base_size_has_the_parameters_of_pytorchs_transformer_and_an_embedding():
    # 44,140,544: sum(p.numel() for p in torch.nn.Transformer().parameters()).
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = shapes(Transformer(TRANSFORMERS["transformer_base"], 37_000), tokens, tokens)
    assert count(params) == 44_140_544 + 37_000 * 512 == 63_084_544
    # The paper's table 3 says 65 million for base and 213 for big, tokens included.
    big = shapes(Transformer(TRANSFORMERS["transformer_big"], 37_000), tokens, tokens)
    assert count(big) == pytest.approx(213e6, rel=0.01)


def by_hand(size, vocabulary, *, reads_source):
    attention = 4 * (size.width**2 + size.width)
    feed_forward = 2 * size.width * size.hidden + size.hidden + size.width
    layer = (2 if reads_source else 1) * (attention + 2 * size.width)
    layer += feed_forward + 2 * size.width
    return vocabulary * size.width + size.layers * layer + 2 * size.width


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_the_parameters_counted_by_hand(name):
    params = shapes(Decoder(DECODERS[name], 256), jnp.zeros((1, 2), jnp.int32))
    assert count(params) == by_hand(DECODERS[name], 256, reads_source=False)


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_every_projection_and_nothing_else_is_sparse(pattern):
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = shapes(Transformer(TRANSFORMERS["transformer_tiny"], 9), tokens, tokens)
    plan = nmjax.make_plan(params, pattern)
    # Four projections an attention, three attentions, two layers a feed-forward network, of 2.
    assert len(plan) == 2 * (3 * 4 + 2 * 2)
    assert not [name for name in plan.dense if name.endswith("kernel")]
    axes = {name.split("/")[-2]: leaf.reduction_axes for name, leaf in plan.items()}
    assert axes["query"] == (-3,)
    assert axes["out"] == (-3, -2)
    assert axes["hidden"] == axes["output"] == (-2,)


def test_a_later_token_changes_nothing_before_it(translator, decoder):
    for position in range(TARGET.shape[1]):
        changed = TARGET.copy()
        changed[:, position] = (changed[:, position] - 3 + 1) % 6 + 3
        for (_, variables, apply), given in ((translator, (SOURCE,)), (decoder, ())):
            before = apply(variables, *given, TARGET)
            after = apply(variables, *given, changed)
            np.testing.assert_array_equal(before[:, :position], after[:, :position])
            assert (before[:, position:] != after[:, position:]).any(axis=(0, 2)).all()


def test_every_source_token_is_seen_and_padding_is_not(translator):
    _, variables, apply = translator
    expected = apply(variables, SOURCE, TARGET)
    for column in range(4):
        changed = SOURCE.copy()
        changed[0, column] = 8 if SOURCE[0, column] != 8 else 3
        assert (apply(variables, changed, TARGET)[0] != expected[0]).any()
    # With more padding a sentence is translated alike.
    longer = np.pad(SOURCE, ((0, 0), (0, 3)))
    np.testing.assert_allclose(apply(variables, longer, TARGET), expected, atol=1e-5)
    # What stands where the padding is does not matter, as long as the mask says so.
    masked = Transformer(TINY, 9, padding=3)
    other = np.where(SOURCE == 0, 3, SOURCE)
    seen = jax.jit(masked.apply)(variables, other, TARGET)
    np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_token_by_token_equals_all_at_once(translator, decoder):
    model, variables, apply = translator
    begin = jax.jit(lambda source: model.apply(variables, source, 7, method="begin"))
    cache = begin(SOURCE)
    check_steps(model, variables, cache, apply(variables, SOURCE, TARGET))
    model, variables, apply = decoder
    cache = model.apply(variables, 2, 7, method="begin")
    check_steps(model, variables, cache, apply(variables, TARGET))


def check_steps(model, variables, cache, expected):
    step = jax.jit(lambda *now: model.apply(variables, *now, method="step"))
    for index in range(TARGET.shape[1]):
        logits, cache = step(TARGET[:, index], index, cache)
        np.testing.assert_allclose(logits, expected[:, index], atol=1e-5)


def test_dropout_acts_in_training_only(decoder):
    _, variables, apply = decoder
    model = Decoder(dataclasses.replace(TINY, dropout=0.5), 9)
    calm = jax.jit(model.apply)(variables, TARGET)
    np.testing.assert_array_equal(calm, apply(variables, TARGET))
    drop = jax.jit(lambda key: model.apply(variables, TARGET, train=True, rngs={"dropout": key}))
    noisy = [drop(jax.random.key(seed)) for seed in (0, 1)]
    assert (noisy[0] != calm).any()
    assert (noisy[0] != noisy[1]).any()


def test_bfloat16_keeps_parameters_in_float32(decoder):
    _, variables, apply = decoder
    model = Decoder(TINY, 9, jnp.bfloat16)
    made = jax.tree.leaves(shapes(model, TARGET))
    assert {leaf.dtype for leaf in made} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, TARGET)
    assert logits.dtype == jnp.bfloat16
    full = apply(variables, TARGET)
    np.testing.assert_allclose(logits, full, atol=0.05 * float(jnp.abs(full).max()))

"""The oracle on products whose axes are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nmjax.real_models.oracle import Product, UndecidedError, find_products

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def product(forward, w, *inputs):
    """What the oracle says about `w` if a random layer and a tanh follow the forward pass."""

    def network(params, *inputs):
        return jnp.tanh(forward(params["w"], *inputs)).reshape(-1) @ params["readout"]

    size = np.prod(jax.eval_shape(forward, w, *inputs).shape, dtype=int)
    return find_products(network, {"w": w, "readout": normal(size, 40)}, *inputs)["w"]


def einsum(spec, *shapes):
    """The oracle's answer for an einsum of a random input and a random weight."""
    x, w = (normal(*shape) for shape in shapes)
    return product(lambda w, x: jnp.einsum(spec, x, w), w, x)


@pytest.mark.parametrize(
    ("spec", "x", "w", "summed"),
    [
        ("bd,df->bf", (1, 12), (12, 16), (-2,)),
        ("bd,df->bf", (3, 12), (12, 16), (-2,)),
        ("bd,fd->bf", (3, 12), (16, 12), (-1,)),
        ("btd,dnh->btnh", (1, 2, 12), (12, 4, 6), (-3,)),
        ("btd,ndh->btnh", (1, 2, 12), (4, 12, 6), (-2,)),
        ("btnh,nhd->btd", (1, 2, 4, 6), (4, 6, 12), (-3, -2)),
        ("btnh,nhd->btd", (1, 1, 2, 16), (2, 16, 12), (-3, -2)),
        ("btnh,hnd->btd", (1, 2, 4, 6), (6, 4, 12), (-3, -2)),
        ("btd,kcdh->btkch", (1, 2, 12), (2, 3, 12, 6), (-2,)),
        ("btnh,nhd->btd", (1, 2, 1, 8), (1, 8, 12), (-2,)),
        ("bd,d->b", (1, 12), (12,), (-1,)),
    ],
)
def test_einsums(spec, x, w, summed):
    assert einsum(spec, x, w) == Product(summed, ())


@pytest.mark.parametrize(
    ("spec", "x", "w", "stack"),
    [
        ("ecd,edf->ecf", (3, 2, 16), (3, 16, 12), (-3,)),
        ("ecd,def->ecf", (3, 2, 16), (16, 3, 12), (-2,)),
    ],
)
def test_experts_with_inputs_of_their_own_are_a_stack(spec, x, w, stack):
    summed = (-2,) if stack == (-3,) else (-3,)
    assert einsum(spec, x, w) == Product(summed, stack)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layers_of_a_scan_are_a_stack(axis):
    def forward(w, x):
        layers = jnp.moveaxis(w, axis, 0)
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)[0]

    w = jnp.moveaxis(normal(3, 16, 16), 0, axis) / 4
    first, _ = (a for a in range(3) if a != axis)
    assert product(forward, w, normal(1, 16)) == Product((first - 3,), (axis - 3,))


def conv(w, x, **options):
    numbers = "WIO" if w.ndim == 3 else "HWIO"
    dims = (numbers.replace("I", "C").replace("O", "N"),) * 2
    dims = ("N" + numbers[:-2] + "C", numbers, "N" + numbers[:-2] + "C")
    options = {"padding": "SAME", **options}
    return jax.lax.conv_general_dilated(
        x, w, (1,) * (w.ndim - 2), dimension_numbers=dims, **options
    )


def test_a_convolution_of_one_pixel_reaches_one_tap():
    assert product(conv, normal(3, 3, 8, 12), normal(1, 1, 1, 8)) == Product((-2,), ())


def test_a_convolution_sums_over_the_taps_that_it_reaches():
    def patches(w, x):
        return conv(w, x, padding="VALID")

    found = product(patches, normal(2, 2, 8, 12), normal(1, 2, 2, 8))
    assert found == Product((-4, -3, -2), ())
    one_pixel = jnp.zeros((1, 2, 2, 8)).at[0, 0, 1].set(normal(8))
    assert product(patches, normal(2, 2, 8, 12), one_pixel) == Product((-2,), ())


def test_groups_look_like_a_stack():
    found = product(
        lambda w, x: conv(w, x, feature_group_count=2), normal(3, 8, 12), normal(1, 1, 16)
    )
    assert found == Product((-2,), (-1,))


def test_a_depthwise_convolution_is_no_product():
    found = product(
        lambda w, x: conv(w, x, feature_group_count=8), normal(3, 3, 1, 8), normal(1, 1, 1, 8)
    )
    assert found is None


def test_a_transposed_convolution_writes_its_taps():
    def forward(w, x):
        return jax.lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
        )

    assert product(forward, normal(2, 2, 12, 8), normal(1, 1, 1, 8)) == Product((-1,), ())


@pytest.mark.parametrize(
    ("forward", "shape", "x"),
    [
        (lambda w, x: w[x], (20, 12), np.array([3, 17])),
        (lambda w, x: jax.nn.one_hot(x, 20) @ w, (20, 12), np.array([3, 17])),
        (lambda w, x: w[:2] + x, (20, 12), normal(2, 12)),
        (lambda w, x: w * x, (3, 12), normal(3, 12)),
        (lambda w, x: jnp.tanh(x) + 0 * w.sum(), (8, 12), normal(3, 12)),
        (lambda w, x: x * w, (12,), normal(2, 12)),
    ],
    ids=["look-up", "one-hot", "positions", "gate", "unused", "gain"],
)
def test_what_is_no_product(forward, shape, x):
    assert product(forward, normal(*shape), x) is None


def test_a_weight_that_is_normalized_first_is_no_product_by_itself():
    found = product(
        lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), normal(12, 16), normal(1, 12)
    )
    assert found is None


def test_a_tied_embedding_sums_over_its_features():
    def forward(w, tokens):
        return jnp.tanh(w[tokens] @ readout) @ w.T

    readout = normal(12, 12)
    assert product(forward, normal(30, 12), np.array([3, 17])) == Product((-1,), ())


def test_a_weight_used_along_both_axes_is_no_single_product():
    found = product(lambda w, x: jnp.tanh(x @ w) @ w.T, normal(12, 12), normal(1, 12))
    assert found is None


def test_two_answers_are_undecided():
    """All losses of a network with a single output agree up to a factor."""
    found = find_products(lambda w, x: (x @ w).sum(), normal(12, 16), normal(1, 12))[""]
    assert isinstance(found, UndecidedError)


def test_integers_have_no_gradient():
    params = {"w": normal(12, 16), "steps": jnp.arange(3)}
    assert list(find_products(lambda p, x: x @ p["w"], params, normal(1, 12))) == ["w"]

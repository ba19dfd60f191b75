"""N:M masks against a brute force that spells the rule out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.masks.nm import nm_mask
from tests.nmjax.float_bits import without_refused

# One n:m for each formulation, at its borders, and sizes that are not powers of two.
PATTERNS = [(1, 1), (1, 2), (2, 4), (3, 3), (4, 4), (1, 5), (4, 8), (3, 7), (1, 16), (8, 32)]
PATTERNS += [(32, 32), (5, 33), (16, 64), (100, 128)]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
# Ties are what goes wrong: few different values, and every special one.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, np.inf, -np.inf, np.nan, -np.nan, 0.5, -3.0]


def brute_force(scores, n, m, axes):
    """Flattens axes, walks over groups, and sorts each one by the rule in plain Python."""
    with np.errstate(invalid="ignore"):  # Signalling NaNs become quiet.
        scores = np.asarray(scores, np.float64)
    axes = [a % scores.ndim for a in ([axes] if isinstance(axes, int) else axes)]
    others = [a for a in range(scores.ndim) if a not in axes]
    order = others + axes
    rows = scores.transpose(order).reshape(-1, m)
    mask = np.zeros(rows.shape, bool)
    for row, kept in zip(rows, mask, strict=True):
        ranking = sorted(range(m), key=lambda i: (not np.isnan(row[i]), -np.nan_to_num(row[i]), i))
        kept[ranking[:n]] = True
    mask = mask.reshape([scores.shape[a] for a in order])
    return mask.transpose(np.argsort(order))


def with_ties(rng, shape, dtype="float32"):
    values = rng.choice(np.array(SPECIAL, np.float32), shape)
    return jnp.asarray(without_refused(values).astype(jnp.dtype(dtype)))


@st.composite
def grouped_weights(draw):
    """Weights of up to four axes, some of them taken together and divisible by m."""
    n, m = draw(st.sampled_from(PATTERNS))
    ndim = draw(st.integers(1, 4))
    axes = draw(st.permutations(range(ndim)))[: draw(st.integers(1, min(3, ndim)))]
    shape = [draw(st.integers(1, 3)) for _ in range(ndim)]
    # m goes whole into one of the axes, or a factor of it each into two of them.
    factor = draw(st.sampled_from([d for d in range(1, m + 1) if m % d == 0]))
    shape[axes[0]] *= factor
    shape[axes[-1]] *= m // factor
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = with_ties(rng, shape, dtype)
    if draw(st.booleans()):
        w = jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype)))
    axis = [a - draw(st.sampled_from([0, ndim])) for a in axes]
    return w, n, m, axis[0] if len(axis) == 1 else tuple(axis)


@given(grouped_weights())
def test_equals_brute_force(case):
    w, n, m, axis = case
    mask = nm_mask(w, n, m, axis)
    assert mask.shape == w.shape
    assert mask.dtype == jnp.bool_
    magnitude = np.abs(np.asarray(w).astype(np.float32))
    np.testing.assert_array_equal(mask, brute_force(magnitude, n, m, axis))


@pytest.mark.parametrize(
    ("n", "m", "axis"),
    [
        *((n, m, -2) for n, m in PATTERNS),
        *((n, m, axis) for n, m in PATTERNS[2::5] for axis in (-1, (-2, -1), (-1, -2))),
    ],
)
def test_every_pattern_on_ties(n, m, axis):
    rng = np.random.default_rng(m)
    w = with_ties(rng, (2, 2 * m, 3 * m if m <= 16 else m))
    np.testing.assert_array_equal(nm_mask(w, n, m, axis), brute_force(np.abs(w), n, m, axis))


@pytest.mark.parametrize(("n", "m"), [(1, 1024), (512, 1024), (1023, 1024), (700, 1500)])
def test_large_groups(n, m):
    rng = np.random.default_rng(0)
    w = jnp.concatenate(
        [with_ties(rng, (2, m)), jnp.asarray(rng.standard_normal((2, m)), "float32")]
    )
    np.testing.assert_array_equal(nm_mask(w, n, m, -1), brute_force(np.abs(w), n, m, -1))


@pytest.mark.parametrize("m", [*range(1, 18), 23, 31, 32, 33, 39, 64])
def test_every_group_size_keeps_exactly_n(m):
    w = jnp.asarray(np.random.default_rng(m).integers(-2, 3, (m, 64)), "float32")
    for n in {1, m // 3 + 1}:
        mask = np.asarray(nm_mask(w, n, m, 0))
        np.testing.assert_array_equal(mask.sum(axis=0), n)
        np.testing.assert_array_equal(mask, brute_force(np.abs(w), n, m, 0))


def neighbors(rng, shape):
    """Float32 weights that differ in their last bits only."""
    bits = rng.integers(0, 4, shape).astype(np.int32) + np.float32(1.0).view(np.int32)
    return jnp.asarray(bits.view(np.float32))


def denormals(rng, shape):
    bits = rng.integers(0, 4, shape).astype(np.int32) | (rng.integers(0, 2, shape) << 31).astype(
        np.int32
    )
    return jnp.asarray(bits.view(np.float32))


def nan_payloads(rng, shape):
    bits = rng.choice(np.array([0x7FC00000, 0x7F800001, 0xFFC01234, 0x7F800000], np.uint32), shape)
    return jnp.asarray(bits.view(np.float32))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 32), (9, 40)])
@pytest.mark.parametrize(
    "values",
    [
        neighbors,
        denormals,
        pytest.param(nan_payloads, marks=pytest.mark.not_under("jax_debug_nans")),
    ],
)
@pytest.mark.parametrize("score", ["magnitude", "signed"])
def test_exact_to_the_last_bit(n, m, values, score):
    w = values(np.random.default_rng(0), (16, m))
    if score == "magnitude":
        mask, scores = nm_mask(w, n, m, -1), np.abs(np.asarray(w))
    else:
        mask, scores = nm_mask(w, n, m, -1, score=lambda x: x), w
    np.testing.assert_array_equal(mask, brute_force(scores, n, m, -1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_value_of_a_small_dtype(dtype):
    values = np.arange(2 ** (8 * jnp.dtype(dtype).itemsize))
    w = values.astype(f"uint{8 * jnp.dtype(dtype).itemsize}").view(jnp.dtype(dtype))
    w = jnp.asarray(without_refused(np.random.default_rng(0).permutation(w)))
    for n, m in [(2, 4), (4, 16)]:
        expected = brute_force(np.abs(np.asarray(w).astype("float32")), n, m, 0)
        np.testing.assert_array_equal(nm_mask(w, n, m, 0), expected)


def test_float64():
    with jax.enable_x64(True):
        w = 1.0 + jnp.asarray(np.random.default_rng(0).integers(0, 4, (40, 64)), "float64") * 1e-15
        for n, m in [(2, 4), (4, 8), (10, 40)]:
            assert w.dtype == jnp.float64
            np.testing.assert_array_equal(nm_mask(w, n, m, 0), brute_force(w, n, m, 0))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (9, 40)])
def test_custom_score_orders_by_value(n, m):
    w = with_ties(np.random.default_rng(1), (3, m, 5))
    mask = nm_mask(w, n, m, score=lambda x: 1 - x)
    np.testing.assert_array_equal(mask, brute_force(1 - np.asarray(w), n, m, -2))


def test_score_may_mix_entries_and_change_dtype():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((8, 6)), "bfloat16")

    def normalized(x):
        x = jnp.abs(x.astype(jnp.float32))
        return x / x.sum(axis=0, keepdims=True)

    np.testing.assert_array_equal(
        nm_mask(w, 2, 4, score=normalized), brute_force(normalized(w), 2, 4, -2)
    )


def test_axes_are_flattened_in_the_order_given():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 8, 5)), "float32")
    oihw = w.transpose(3, 2, 0, 1).reshape(5, -1)
    expected = nm_mask(oihw, 2, 4, -1).reshape(5, 8, 3, 3).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(nm_mask(w, 2, 4, (-2, -4, -3)), expected)


def test_attention_out_kernel_needs_no_merge_where_heads_hold_whole_groups():
    w = jnp.ones((6, 8, 5))
    assert nm_mask(w, 2, 4, (-3, -2)).tolist() == nm_mask(w, 2, 4, -2).tolist()
    text = jax.jit(lambda w: nm_mask(w, 2, 4, (-3, -2))).lower(w).as_text()
    assert "transpose" not in text


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (10, 40)])
class TestProperties:
    @pytest.fixture
    def w(self, m):
        return jnp.asarray(np.random.default_rng(0).standard_normal((2, 2 * m, 6)), "float32")

    def test_idempotent(self, w, n, m):
        mask = nm_mask(w, n, m)
        np.testing.assert_array_equal(nm_mask(jnp.where(mask, w, 0), n, m), mask)

    def test_scale_and_sign_change_nothing(self, w, n, m):
        np.testing.assert_array_equal(nm_mask(-w * 4.0, n, m), nm_mask(w, n, m))

    def test_permuting_within_groups_permutes_the_mask(self, w, n, m):
        order = np.random.default_rng(1).permutation(m)
        order = np.concatenate([order, order + m])
        np.testing.assert_array_equal(nm_mask(w[:, order], n, m), nm_mask(w, n, m)[:, order])

    def test_kept_magnitudes_are_no_smaller_than_dropped_ones(self, w, n, m):
        groups = jnp.abs(w).reshape(2, 2, m, 6)
        mask = nm_mask(w, n, m).reshape(groups.shape)
        least_kept = jnp.where(mask, groups, jnp.inf).min(axis=2)
        assert (least_kept >= jnp.where(mask, 0, groups).max(axis=2)).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (10, 40)])
class TestTransformations:
    @pytest.fixture
    def w(self, m):
        return with_ties(np.random.default_rng(0), (3, 2 * m, 4))

    def test_jit_equals_eager(self, w, n, m):
        with jax.disable_jit():
            eager = nm_mask(w, n, m)
        np.testing.assert_array_equal(jax.jit(lambda w: nm_mask(w, n, m))(w), eager)

    def test_vmap_equals_a_leading_axis(self, w, n, m):
        np.testing.assert_array_equal(jax.vmap(lambda w: nm_mask(w, n, m))(w), nm_mask(w, n, m))
        over_last = jax.vmap(lambda w: nm_mask(w, n, m, -1), in_axes=2, out_axes=2)(w)
        np.testing.assert_array_equal(over_last, nm_mask(w, n, m))

    def test_scan(self, w, n, m):
        masks = jax.lax.scan(lambda _, w: (None, nm_mask(w, n, m)), None, w)[1]
        np.testing.assert_array_equal(masks, nm_mask(w, n, m))

    def test_gradient_passes_through_kept_weights_only(self, w, n, m):
        w = jnp.nan_to_num(w, posinf=5, neginf=-5)

        def loss(w):
            return jnp.sum(jnp.where(nm_mask(w, n, m), w, 0) ** 2)

        expected = jnp.where(nm_mask(w, n, m), 2 * w, 0)
        np.testing.assert_array_equal(jax.grad(loss)(w), expected)
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w), expected)
        np.testing.assert_array_equal(jax.jvp(loss, (w,), (w,))[1], jnp.vdot(expected, w))

    def test_gradient_with_a_custom_score(self, w, n, m):
        def loss(w):
            return jnp.where(nm_mask(w, n, m, score=lambda x: jnp.sqrt(x * x)), w, 0).sum()

        assert jnp.isfinite(jax.grad(loss)(w)).all()

    def test_no_gradient_reaches_what_scores_depend_on(self, w, n, m):
        def sparse(scale):
            mask = nm_mask(w, n, m, score=lambda w: jnp.abs(w) * scale)
            return mask.astype(jnp.float32)

        scale = jnp.ones((w.shape[0], 1, 1))
        for f in (sparse, jax.jit(sparse)):
            found, tangent = jax.jvp(f, (scale,), (scale,))
            np.testing.assert_array_equal(found, nm_mask(w, n, m))
            assert not tangent.any()

    def test_abstract(self, w, n, m):
        out = jax.eval_shape(lambda w: nm_mask(w, n, m), jax.ShapeDtypeStruct(w.shape, w.dtype))
        assert (out.shape, out.dtype) == (w.shape, jnp.bool_)


def test_numpy_weights_and_integers():
    w = np.arange(8.0, dtype="float32").reshape(8, 1)
    assert nm_mask(w, np.int64(1), np.int32(4), np.int64(0)).tolist() == [
        [i % 4 == 3] for i in range(8)
    ]
    assert nm_mask(w, 1, 4, [0, 1]).tolist() == nm_mask(w, 1, 4, 0).tolist()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_no_weights(shape):
    for n, m in [(2, 4), (4, 8), (20, 40)]:
        assert nm_mask(jnp.zeros((shape[0] * m, shape[1])), n, m).shape == (shape[0] * m, shape[1])


W = jnp.ones((8, 6))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W, 0, 4), ValueError, "1 <= n <= m"),
        ((W, 5, 4), ValueError, "n=5, m=4"),
        ((W, -1, 4), ValueError, "1 <= n <= m"),
        ((W, 2.0, 4), TypeError, "n must be a Python integer"),
        ((W, True, 4), TypeError, "n must be a Python integer"),
        ((W, 2, "4"), TypeError, "m must be a Python integer"),
        ((W, 2, 4, -1), ValueError, r"groups of 4 do not fit.*\(8, 6\) have 6 along axis -1"),
        ((W, 2, 5, (0, 1)), ValueError, r"have 48 along axis \(0, 1\), which 5 does not divide"),
        ((W, 2, 4, 2), ValueError, r"axis 2 is out of range for weights of shape \(8, 6\)"),
        ((W, 2, 4, -3), ValueError, "out of range"),
        ((W, 2, 4, (0, -2)), ValueError, "repeats an axis"),
        ((W, 2, 4, ()), TypeError, "axis must be an integer"),
        ((W, 2, 4, 0.0), TypeError, "axis must be an integer"),
        ((W, 2, 4, None), TypeError, "axis must be an integer"),
        ((W, 2, 4, True), TypeError, "axis must be an integer"),
        ((jnp.ones(()), 1, 1), ValueError, "out of range"),
        ((jnp.ones((8, 6), "int32"), 2, 4), TypeError, "weights must be real floating.*int32"),
        ((jnp.ones((8, 6), "complex64"), 2, 4), TypeError, "real floating.*complex64"),
        ((jnp.ones((8, 6), bool), 2, 4), TypeError, "real floating.*bool"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        nm_mask(*arguments)
    with pytest.raises(error, match=message):
        jax.jit(functools.partial(_call, arguments[1:]))(arguments[0])


def _call(rest, w):
    return nm_mask(w, *rest)


def test_bad_scores():
    with pytest.raises(ValueError, match=r"weights have shape \(8, 6\), scores have shape \(6,\)"):
        nm_mask(W, 2, 4, score=lambda w: w.sum(axis=0))
    with pytest.raises(TypeError, match="scores must be real floating point, got dtype int32"):
        nm_mask(W, 2, 4, score=lambda w: w.astype("int32"))

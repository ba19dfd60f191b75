"""What a user put into a layer is kept under packed_apply, or refused by name."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nmjax
from nmjax.linen import make_plan, packed_apply, sparsify

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 16)), jnp.float32)
PATTERNS = ["2:4", "1x4@0.5"]


def pruned_and_packed(module, pattern, plan=None, **call):
    """The variables of a module with pruned and with packed kernels."""
    variables = module.init(jax.random.key(0), X, **call)
    if plan is None:
        plan = nmjax.make_plan(
            variables["params"], pattern, include="kernel$", axes={"kernel$": -2}
        )
    pruned = {**variables, "params": nmjax.prune(variables["params"], plan)}
    return pruned, {**variables, "params": nmjax.pack(pruned["params"], plan)}


def assert_same_outputs(module, pattern):
    pruned, packed = pruned_and_packed(module, pattern, make_plan(module, pattern, X))
    y = jax.jit(packed_apply(module))(packed, X)
    np.testing.assert_allclose(y, module.apply(pruned, X), rtol=1e-5, atol=1e-5)


def rounded_product(x, w, dimension_numbers, precision=None):
    """A product as an int8 library would compute it."""
    scales = [jnp.abs(a).max() / 7 for a in (x, w)]
    x, w = (jnp.round(a / scale) * scale for a, scale in zip((x, w), scales, strict=True))
    return lax.dot_general(x, w, dimension_numbers)


def doubled_conv(*operands, **settings):
    return 2 * lax.conv_general_dilated(*operands, **settings)


def doubled(*arrays, dtype=None):
    return tuple(None if array is None else 2 * array for array in arrays)


MASK = jnp.ones((3, 3, 16, 16)).at[2].set(0).at[1, 1:].set(0)
OWN = {
    "dot_general": nn.Dense(16, dot_general=rounded_product),
    "dot_general of a general layer": nn.DenseGeneral((4, 4), dot_general=rounded_product),
    "dot_general of attention": nn.MultiHeadDotProductAttention(2, qkv_dot_general=rounded_product),
    "promote_dtype": nn.Dense(16, promote_dtype=doubled),
    "promote_dtype of a convolution": nn.Conv(16, (3, 3), promote_dtype=doubled),
    "conv_general_dilated": nn.Conv(16, (3, 3), conv_general_dilated=doubled_conv),
    "mask": nn.Conv(16, (3, 3), mask=MASK),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("own", OWN)
def test_a_layer_keeps_its_own_product(own, pattern):
    assert_same_outputs(OWN[own], pattern)


def refused(module, pattern="2:4", **call):
    _, packed = pruned_and_packed(module, pattern, **call)
    return partial(packed_apply(module), packed, X, **call)


class Fp8(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, dot_general_cls=nn.Fp8DotGeneralOp, name="head")(x)


class Product(nn.Module):
    def __call__(self, *operands, **settings):
        return lax.dot_general(*operands, **settings)


class Inner(nn.Module):
    layer: type[nn.Module]
    call: tuple = ()

    @nn.compact
    def __call__(self, x):
        return self.layer(nn.Dense(16, name="inner"))(x, **dict(self.call))


REFUSED = {
    "a class of products": (Fp8(), r"head/kernel \(16, 16\): Dense at head .*dot_general_cls"),
    "a class of convolutions": (
        nn.Conv(16, (3, 3), conv_general_dilated_cls=lambda: doubled_conv),
        r"kernel \(3, 3, 16, 16\): Conv at the root .*conv_general_dilated_cls",
    ),
    "a module as product": (
        nn.Dense(16, dot_general=Product()),
        r"kernel \(16, 16\): Dense .*a module as its dot_general",
    ),
    "weight norm": (Inner(nn.WeightNorm), "inner/kernel: WeightNorm at WeightNorm_0 normalizes"),
    "spectral norm": (
        Inner(nn.SpectralNorm, (("update_stats", False),)),
        "inner/kernel: SpectralNorm at SpectralNorm_0 normalizes",
    ),
    "spectral norm at the root": (
        nn.SpectralNorm(nn.Dense(16)),
        "layer_instance/kernel: SpectralNorm at the root normalizes",
    ),
    "einsum": (nn.Einsum((16, 16), "abcd,de->abce"), r"Einsum at the root has packed .*kernel"),
    "transposed": (nn.ConvTranspose(16, (3, 3)), r"ConvTranspose at the root has packed .*kernel"),
    "local": (nn.ConvLocal(16, (3, 3)), r"ConvLocal at the root has packed .*kernel"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(what):
    module, message = REFUSED[what]
    call = {"update_stats": False} if what == "spectral norm at the root" else {}
    with pytest.raises(TypeError, match=f"{message}.*exclude="):
        refused(module, **call)()


def double_params(variables):
    return jax.tree.map(lambda leaf: leaf * 2, variables)


class Mapped(nn.Module):
    """Maps the variables of two layers by a function, not by a class."""

    @nn.compact
    def __call__(self, x):
        layers = nn.Sequential([nn.Dense(16), nn.Dense(16)])
        run = nn.map_variables(lambda m, x: m(x), "params", double_params, init=True)
        return run(layers, x)


def test_weights_that_change_on_the_way_to_the_layer_are_refused():
    """Integer factors keep the dtype of the positions, so only the way there gives them away."""
    _, packed = pruned_and_packed(nn.Dense(16), "2:4")
    doubled_layer = nn.map_variables(nn.Dense, "params", double_params)
    with pytest.raises(TypeError, match=r"kernel \(16, 16\): .*nn.map_variables.*exclude="):
        packed_apply(doubled_layer(16))(packed, X)
    with pytest.raises(TypeError, match=r"Dense_0/kernel .*inside nn.map_variables.*exclude="):
        refused(Mapped())()


def test_a_module_quantized_by_qwix_is_refused():
    # What qwix's quantize_model makes of a linen module's class.
    quantized = type("Dense", (nn.Dense,), {"_unquantized_type": nn.Dense})
    _, packed = pruned_and_packed(nn.Dense(16), "2:4")
    with pytest.raises(TypeError, match=r"kernel: Dense at the root is quantized by qwix"):
        packed_apply(quantized(16))(packed, X)


def test_a_module_that_trains_sparse_is_refused():
    _, packed = pruned_and_packed(nn.Dense(16), "2:4")
    with pytest.raises(TypeError, match=r"kernel: .*run packed_apply on the Dense"):
        packed_apply(sparsify(nn.Dense(16), "2:4"))(packed, X)


class OwnProduct(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (16, self.features))


def test_a_subclass_that_reads_its_kernel_is_named():
    with pytest.raises(TypeError, match=r"kernel: OwnProduct at the root reads its kernel itself"):
        refused(OwnProduct(16))()


class Adapter(nn.Module):
    """A low-rank adapter whose leaves lie beside those of its layer."""

    def setup(self):
        self.layer = nn.Dense(16)
        nn.share_scope(self, self.layer)
        self.down, self.up = nn.Dense(2), nn.Dense(16)

    def __call__(self, x):
        return self.layer(x) + self.up(self.down(x))


def test_layers_that_share_their_scope():
    pruned = Adapter().init(jax.random.key(0), X)
    plan = nmjax.make_plan(pruned["params"], "2:4", include="^kernel$")
    pruned = {"params": nmjax.prune(pruned["params"], plan)}
    packed = {"params": nmjax.pack(pruned["params"], plan)}
    y = jax.jit(packed_apply(Adapter()))(packed, X)
    np.testing.assert_allclose(y, Adapter().apply(pruned, X), rtol=1e-5, atol=1e-5)


LIFTED = {
    "jit": nn.jit(nn.Dense)(16),
    "remat": nn.remat(nn.Dense)(16),
    "vmap": nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(16),
    "rnn": nn.RNN(nn.LSTMCell(16)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lifted", LIFTED)
def test_lifted_layers(lifted, pattern):
    assert_same_outputs(LIFTED[lifted], pattern)


class Stacked(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        settings = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(Block, length=16, **settings)(name="layers")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(16, use_bias=False, name="dense")(x)), None


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("axis", "axes"), [(1, (-3, -1)), (2, (-3, -2))])
def test_layers_that_are_not_stacked_in_front_are_refused(axis, axes, pattern):
    """As many layers as inputs and outputs: no shape gives the mistake away."""
    params = Stacked(axis).init(jax.random.key(0), X)["params"]
    plan = nmjax.make_plan(params, pattern, axes={"kernel": nmjax.Axes((axes[0],), (axes[1],), ())})
    packed = {"params": nmjax.pack(nmjax.prune(params, plan), plan)}
    with pytest.raises(ValueError, match=rf"layers/dense/kernel .*along axis {axis}, .*exclude="):
        packed_apply(Stacked(axis))(packed, X)


@pytest.mark.parametrize(
    ("precision", "shown"),
    [
        (None, "DEFAULT"),
        ("highest", "HIGHEST"),
        (lax.Precision.HIGH, "HIGH"),
        ((lax.Precision.HIGHEST, lax.Precision.HIGHEST), "HIGHEST"),
        (("high", "default"), "HIGH, DEFAULT"),
        (lax.DotAlgorithmPreset.F32_F32_F32, "DEFAULT, algorithm"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Dense, partial(nn.Conv, kernel_size=(1, 1))])
def test_the_precision_of_a_layer(layer, precision, shown):
    if precision is lax.DotAlgorithmPreset.F32_F32_F32 and layer is not nn.Dense:
        pytest.skip("convolutions have no algorithms")
    module = layer(16, precision=precision)
    _, packed = pruned_and_packed(module, "2:4")
    text = jax.jit(packed_apply(module, implementation="xla")).lower(packed, X).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    products += [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(products) == 1
    found = re.findall("DEFAULT|HIGHEST|HIGH|algorithm", products[0]) or ["DEFAULT"]
    assert ", ".join(dict.fromkeys(found)) == shown

"""NNX modules on packed weights compute what they compute on pruned ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import nmjax
import nmjax.nnx
from nmjax.packed.weight import is_packed
from tests.nmjax.nnx.networks import (
    Call,
    Network,
    assert_same,
    mapped,
    normal,
    scanned,
    stack_of_layers,
)


def rngs():
    return nnx.Rngs(0)


def conv(*size, **settings):
    return nnx.Conv(16, 16, size, **settings, rngs=rngs())


def attention(**settings):
    return nnx.MultiHeadAttention(4, 16, decode=False, **settings, rngs=rngs())


def einsum(subscripts, shape, bias=None, **settings):
    return nnx.Einsum(subscripts, shape, bias, **settings, rngs=rngs())


# Name -> (module, shape of its input). The kernels of all have 2:4 and 1xN form.
MODULES = {
    "linear": lambda: (nnx.Linear(16, 8, rngs=rngs()), (3, 16)),
    "no_bias": lambda: (nnx.Linear(16, 8, use_bias=False, rngs=rngs()), (2, 3, 16)),
    "to_heads": lambda: (nnx.LinearGeneral(16, (2, 4), rngs=rngs()), (3, 16)),
    "from_heads": lambda: (
        nnx.LinearGeneral((2, 8), 8, axis=(-2, -1), rngs=rngs()),
        (3, 2, 8),
    ),
    "spread_axes": lambda: (nnx.LinearGeneral((4, 8), 8, axis=(1, -1), rngs=rngs()), (3, 4, 5, 8)),
    "experts": lambda: (nnx.LinearGeneral(16, 8, batch_axis={0: 3}, rngs=rngs()), (3, 5, 16)),
    "conv_1d": lambda: (conv(3, padding="CAUSAL"), (2, 8, 16)),
    "conv_2d": lambda: (conv(3, 3, strides=2), (2, 8, 8, 16)),
    "circular": lambda: (conv(3, 3, padding="CIRCULAR"), (8, 8, 16)),
    "dilated": lambda: (conv(3, 3, kernel_dilation=2, padding="VALID"), (2, 8, 8, 16)),
    "input_dilated": lambda: (conv(3, 3, input_dilation=2, padding=1), (2, 4, 4, 16)),
    "grouped": lambda: (conv(3, 3, feature_group_count=2), (2, 8, 8, 16)),
    "einsum": lambda: (einsum("btd,dnh->btnh", (16, 4, 8), (4, 8)), (2, 5, 16)),
    "einsum_transposed": lambda: (einsum("...i,oi->...o", (8, 16), (8,)), (2, 5, 16)),
    "einsum_moved": lambda: (einsum("btd,df->ftb", (16, 8)), (2, 5, 16)),
    "einsum_experts": lambda: (einsum("ebd,edf->bef", (3, 16, 8)), (3, 5, 16)),
    "attention": lambda: (attention(), (2, 5, 16)),
    "attention_normalized": lambda: (attention(normalize_qk=True), (2, 5, 16)),
    "scan": lambda: (Call(stack_of_layers(rngs()), scanned), (2, 16)),
    "vmap": lambda: (Call(stack_of_layers(rngs()), mapped), (3, 2, 16)),
    "network": lambda: (Network(rngs()), (5, 16)),
    "lora": lambda: (nnx.LoRALinear(16, 8, lora_rank=2, rngs=rngs()), (3, 16)),
    "lstm": lambda: (nnx.RNN(nnx.LSTMCell(16, 16, rngs=rngs()), rngs=rngs()), (2, 5, 16)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
@pytest.mark.parametrize("name", MODULES)
def test_packed_modules_compute_the_same(name, pattern):
    model, shape = MODULES[name]()
    model.eval()
    x = normal(*shape)
    plan = nmjax.nnx.make_plan(model, pattern, inputs=(x,))
    nmjax.nnx.prune(model, plan)
    expected = model(x)
    packed = nmjax.nnx.pack(model, plan)
    weights = jax.tree.leaves(nnx.state(packed), is_leaf=is_packed)
    assert sum(map(is_packed, weights)) == len(plan)
    for got in (packed(x), nnx.jit(lambda model, x: model(x))(packed, x)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert got.dtype == expected.dtype


def test_the_original_is_not_disturbed():
    model, x = Network(rngs()), normal(5, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    graph, state = nnx.split(model)
    before = jax.tree.map(jnp.copy, state)
    packed = nmjax.nnx.pack(model, plan)
    packed(x)  # In training mode: it updates its own statistics and random streams.
    assert int(packed.dropout.rngs.count[...]) == 1
    assert nnx.graphdef(model) == graph
    assert_same(nnx.state(model), before, rtol=0)
    assert model.head.dot_general is lax.dot_general


def test_products_of_stacks_are_packed_ones():
    """A kernel that is unpacked in the call would be as slow as a dense one."""
    model, x = Call(stack_of_layers(rngs()), scanned), normal(2, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    graph, state = nnx.split(packed)
    text = str(jax.make_jaxpr(lambda state: nnx.merge(graph, state, copy=True)(x))(state))
    assert "custom_vjp_call" in text
    assert "u8[" in text


def test_masks_decide_what_is_kept():
    model, x = nnx.Linear(16, 8, rngs=rngs()), normal(3, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    masks = {"kernel": jnp.tile(jnp.array([[True], [True], [False], [False]]), (4, 8))}
    packed = nmjax.nnx.pack(model, plan, masks)
    nmjax.nnx.prune(model, plan, masks)
    np.testing.assert_array_equal(packed.kernel.get_value().unpack(), model.kernel[...])


PROMOTES = pytest.mark.not_under("jax_numpy_dtype_promotion")  # Flax does.


@pytest.mark.parametrize("setting", ["dtype", pytest.param("param_dtype", marks=PROMOTES)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_those_of_flax(dtype, setting):
    x = normal(3, 64)
    model = nnx.Linear(64, 8, rngs=rngs(), **{setting: dtype})
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    packed, expected = nmjax.nnx.pack(model, plan)(x), model(x)
    assert packed.dtype == expected.dtype
    np.testing.assert_allclose(packed, expected, rtol=2e-2, atol=2e-2)


def test_a_wider_result_is_not_rounded_first():
    x = normal(3, 64).astype(jnp.bfloat16)
    settings = {"param_dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    model = nnx.Linear(64, 8, use_bias=False, rngs=rngs(), **settings)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    got, expected = nmjax.nnx.pack(model, plan)(x), model(x)
    assert got.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_cells_with_state_of_their_own():
    """Autoregressive attention updates the cache of the packed module."""
    model = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs())
    x = normal(2, 1, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    outputs = []
    for module in (model, packed):
        module.init_cache((2, 4, 16))
        outputs.append([module(x * step, decode=True) for step in (1, 2)])
        assert int(module.cache_index[...]) == 2
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def own_product(*args, **kwargs):
    return lax.dot_general(*args, **kwargs)


def own_convolution(*args, **kwargs):
    return lax.conv_general_dilated(*args, **kwargs)


def own_einsum(*args, **kwargs):
    return jnp.einsum(*args, **kwargs)


def own_promotion(args, **kwargs):
    return args


class OwnProduct:
    def __call__(self, *args, **kwargs):
        return lax.dot_general(*args, **kwargs)


class OwnLayer(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(normal(16, 8))

    def __call__(self, x):
        return x @ self.kernel[...]


class OwnWeights(nnx.Module):
    def __init__(self):
        self.weights = nnx.List([nnx.Param(normal(16, 8))])

    def __call__(self, x):
        return x @ self.weights[0][...]


class Normalized(nnx.Module):
    def __init__(self, kind):
        self.normal = kind(nnx.Linear(16, 8, rngs=rngs()), rngs=rngs())

    def __call__(self, x):
        return self.normal(x)


REFUSED = {
    "dot_general": (
        lambda: nnx.Linear(16, 8, dot_general=own_product, rngs=rngs()),
        "kernel: Linear has its own dot_general",
    ),
    "promote_dtype": (
        lambda: nnx.Linear(16, 8, promote_dtype=own_promotion, rngs=rngs()),
        "kernel: Linear has its own promote_dtype",
    ),
    "general": (
        lambda: nnx.LinearGeneral(16, 8, dot_general=own_product, rngs=rngs()),
        "kernel: LinearGeneral has its own dot_general,",
    ),
    "general_class": (
        lambda: nnx.LinearGeneral(16, 8, dot_general_cls=OwnProduct, rngs=rngs()),
        "kernel: LinearGeneral has its own dot_general_cls",
    ),
    "attention": (
        lambda: Call(attention(out_dot_general=own_product), lambda layer, x: layer(x[None])),
        "layer/out/kernel: LinearGeneral has its own dot_general",
    ),
    "convolution": (
        lambda: Call(
            nnx.Conv(16, 8, (1,), conv_general_dilated=own_convolution, rngs=rngs()),
            lambda layer, x: layer(x[None]),
        ),
        "layer/kernel: Conv has its own conv_general_dilated",
    ),
    "mask": (
        lambda: Call(
            nnx.Conv(16, 8, (3,), mask=jnp.ones((3, 16, 8)), rngs=rngs()),
            lambda layer, x: layer(x[None]),
        ),
        "layer/kernel: Conv has its own mask",
    ),
    "einsum_op": (
        lambda: einsum("bi,io->bo", (16, 8), einsum_op=own_einsum),
        "kernel: Einsum has its own einsum_op",
    ),
    "transposed": (
        lambda: Call(nnx.ConvTranspose(16, 8, (3,), rngs=rngs()), lambda layer, x: layer(x[None])),
        "layer/kernel: it is the 'kernel' of ConvTranspose",
    ),
    "own_layer": (OwnLayer, "kernel: it is the 'kernel' of OwnLayer"),
    "own_weights": (OwnWeights, "weights/0: it is the '0' of List"),
    "weight_norm": (
        lambda: Normalized(nnx.WeightNorm),
        "normal/layer_instance/kernel: WeightNorm computes it",
    ),
    "spectral_norm": (
        lambda: Normalized(lambda layer, rngs: nnx.SpectralNorm(layer, rngs=rngs)),
        "normal/layer_instance/kernel: SpectralNorm computes it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honored_is_refused_by_name(name):
    build, message = REFUSED[name]
    model = build()
    state = nnx.state(model, nnx.Param)
    # Newer versions of Flax name the scales of WeightNorm after the kernel.
    of_weights = {r"kernel$|weights": -2}
    plan = nmjax.make_plan(state, "2:4", axes=of_weights, on_unknown="dense")
    nmjax.nnx.prune(model, plan)
    with pytest.raises(TypeError, match=message.replace("(", r"\(")):
        nmjax.nnx.pack(model, plan)


class Doubled(nnx.Param):
    def get_value(self, **kwargs):
        return 2 * super().get_value(**kwargs)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
@pytest.mark.parametrize("hook", ["on_get_value", "on_set_value", "get_value"])
def test_variables_with_hooks_are_refused(hook):
    model = nnx.Linear(16, 8, rngs=rngs())
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=((3, 16),))
    nmjax.nnx.prune(model, plan)
    w = model.kernel[...]
    hooks = {hook: lambda variable, value: 2 * value}
    model.kernel = Doubled(w) if hook == "get_value" else nnx.Param(w, **hooks)
    with pytest.raises(TypeError, match=rf"kernel: its variable has its own {hook}"):
        nmjax.nnx.pack(model, plan)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_hooks_of_creation_do_not_run_again():
    model = nnx.Linear(16, 8, rngs=rngs())
    model.kernel = nnx.Param(model.kernel[...], on_create_value=lambda variable, value: 2 * value)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=((3, 16),))
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    np.testing.assert_array_equal(packed.kernel[...].unpack(), model.kernel[...])


def test_packed_kernels_keep_their_metadata_but_not_the_sharding_of_dense_ones():
    model = nnx.Linear(16, 8, rngs=rngs())
    model.kernel.set_metadata(out_sharding=(None, "model"), tag="body")
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=((3, 16),))
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    assert packed.kernel.tag == "body"
    spec = nnx.get_partition_spec(nnx.state(packed, nnx.Param))["kernel"].get_value()
    assert spec == jax.sharding.PartitionSpec()
    np.testing.assert_allclose(packed(normal(3, 16)), model(normal(3, 16)), rtol=1e-5, atol=1e-5)


def test_a_module_quantized_by_qwix_is_refused():
    model = nnx.Linear(16, 8, rngs=rngs())
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=((3, 16),))
    nmjax.nnx.prune(model, plan)
    model.__class__ = type("Linear", (nnx.Linear,), {"_unquantized_type": nnx.Linear})
    with pytest.raises(TypeError, match="Linear is quantized by qwix"):
        nmjax.nnx.pack(model, plan)


@pytest.mark.parametrize("axes", [-1, (-2, -1)])
@pytest.mark.parametrize(
    "model",
    [
        lambda: nnx.LinearGeneral(16, (4, 4), rngs=rngs()),
        lambda: einsum("bi,ioh->boh", (16, 4, 4)),
    ],
)
def test_other_axes_are_refused(model, axes):
    model = model()
    plan = nmjax.make_plan(nnx.state(model, nnx.Param), "2:4", axes={"kernel": axes})
    nmjax.nnx.prune(model, plan)
    with pytest.raises(TypeError, match=r"kernel: it is planned along .* sums over \(-3,\)"):
        nmjax.nnx.pack(model, plan)


def test_a_convolution_planned_along_its_outputs_is_refused():
    model = conv(3, 3)
    axes = {"kernel": nmjax.Axes(-1, -2, (-4, -3))}
    plan = nmjax.make_plan(nnx.state(model, nnx.Param), "2:4", axes=axes)
    nmjax.nnx.prune(model, plan)
    with pytest.raises(TypeError, match=r"kernel: it is planned along \(-1,\).*sums over \(-2,\)"):
        nmjax.nnx.pack(model, plan)


def test_a_stack_along_another_axis_is_refused():
    class Stack(nnx.Module):
        def __init__(self):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=1)
            def build(rngs):
                return nnx.Linear(16, 16, use_bias=False, rngs=rngs)

            self.layers = build(rngs())

        def __call__(self, x):
            return nnx.scan(lambda layer, x: layer(x), in_axes=(1, nnx.Carry), out_axes=nnx.Carry)(
                self.layers, x
            )

    model = Stack()
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=((2, 16),))
    nmjax.nnx.prune(model, plan)
    with pytest.raises(TypeError, match=r"layers/kernel: .* along the first axis"):
        nmjax.nnx.pack(model, plan)


def test_an_equation_given_in_the_call():
    layer = nnx.Einsum("bi,io->bo", (16, 8), rngs=rngs())
    layer.einsum_str = None
    model, x = Call(layer, lambda layer, x: layer(x, "bi,io->bo")), normal(3, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    np.testing.assert_allclose(nmjax.nnx.pack(model, plan)(x), model(x), rtol=1e-5, atol=1e-5)


def test_packed_parameters_are_read_whole():
    model = nnx.Linear(16, 8, rngs=rngs())
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=((1, 16),))
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    assert is_packed(packed.kernel[...])
    assert packed.kernel.shape == (16, 8)
    with pytest.raises(TypeError, match="cannot be indexed by 0"):
        packed.kernel[0]
    with pytest.raises(TypeError, match=r"packed weight of shape \(16, 8\) is not an array"):
        normal(3, 16) @ packed.kernel
    with pytest.raises(ValueError, match="packed already: kernel"):
        nmjax.nnx.pack(packed, plan)


def test_packing_twice():
    """Other weights of a module that is packed in part."""
    model, x = Network(rngs()), normal(3, 16)
    model.eval()
    body = nmjax.nnx.make_plan(model, "2:4", inputs=(x,), exclude="head")
    head = nmjax.nnx.make_plan(model, "1x4@0.5", inputs=(x,), include="head")
    nmjax.nnx.prune(model, body)
    nmjax.nnx.prune(model, head)
    packed = nmjax.nnx.pack(nmjax.nnx.pack(model, body), head)
    assert all(is_packed(layer.kernel[...]) for layer in (*packed.layers, packed.head))
    np.testing.assert_allclose(packed(x), model(x), rtol=1e-5, atol=1e-5)


def test_shared_kernels_are_packed_once():
    class Tied(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Linear(16, 16, rngs=rngs()) for _ in range(2))
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))

    model, x = Tied(), normal(3, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    packed = nmjax.nnx.pack(model, plan)
    assert packed.a.kernel is packed.b.kernel
    np.testing.assert_allclose(packed(x), model(x), rtol=1e-5, atol=1e-5)


def test_packing_under_jit():
    model, x = nnx.Linear(16, 8, rngs=rngs()), normal(3, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    packed = nnx.jit(lambda model: nmjax.nnx.pack(model, plan))(model)
    np.testing.assert_allclose(packed(x), model(x), rtol=1e-5, atol=1e-5)


def test_packed_states_alone_do_not_make_a_module():
    """Flax's layers read their kernels as arrays, which packed weights are not."""
    model, x = nnx.Linear(16, 8, rngs=rngs()), normal(3, 16)
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(x,))
    nmjax.nnx.prune(model, plan)
    graph, state = nnx.split(model)
    with pytest.raises(TypeError, match=r"cannot be indexed.*nmjax\.nnx\.pack"):
        nnx.merge(graph, nmjax.pack(state, plan))(x)

"""Weights to PyTorch and back: exact, and the other library computes the same with them."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import nmjax
from nmjax.files.tensor_files import read_tensors
from nmjax.files.torch_layout import from_torch, masks_from_torch, save_torch, to_torch, torch_name
from nmjax.trees.leaves import map_named
from tests.nmjax.packed_weights import prune_and_pack

try:
    import safetensors.torch
    import torch
    import torch.nn.utils.prune
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(
    torch is None, reason="PyTorch, the other side, is not installed: pip install 'nmjax[torch]'"
)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "stem": {"kernel": normal(3, 2, 8, 4), "bias": normal(4)},
    "depthwise": {"kernel": normal(3, 3, 1, 4)},
    "conv": {"kernel": normal(5, 8, 4), "bias": normal(4)},
    "norm": {"scale": normal(4), "bias": normal(4), "mean": normal(4), "var": normal(4)},
    "attention": {
        **{
            name: {"kernel": normal(8, 2, 4), "bias": normal(2, 4)}
            for name in ("query", "key", "value")
        },
        "out": {"kernel": normal(2, 4, 8), "bias": normal(8)},
    },
    "embed": {"embedding": normal(16, 8)},
    "head": {"kernel": normal(8, 6), "bias": normal(6)},
    "temperature": normal(),
}
PLAN = nmjax.make_plan(
    PARAMS, "2:4", rules={"head": "1x2@0.5"}, include=("stem", "attention", "head")
)


def leaf(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return np.asarray(tree)


def test_names_and_axes():
    state = to_torch(PARAMS, transposed=())
    assert {name: array.shape for name, array in state.items()} == {
        "attention.key.bias": (8,),
        "attention.key.weight": (8, 8),
        "attention.out.bias": (8,),
        "attention.out.weight": (8, 8),
        "attention.query.bias": (8,),
        "attention.query.weight": (8, 8),
        "attention.value.bias": (8,),
        "attention.value.weight": (8, 8),
        "conv.bias": (4,),
        "conv.weight": (4, 8, 5),
        "depthwise.weight": (4, 1, 3, 3),
        "embed.weight": (16, 8),
        "head.bias": (6,),
        "head.weight": (6, 8),
        "norm.bias": (4,),
        "norm.running_mean": (4,),
        "norm.running_var": (4,),
        "norm.weight": (4,),
        "stem.bias": (4,),
        "stem.weight": (4, 8, 3, 2),
        "temperature": (),
    }
    np.testing.assert_array_equal(state["head.weight"], leaf(PARAMS, "head/kernel").T)
    stem = leaf(PARAMS, "stem/kernel")
    np.testing.assert_array_equal(state["stem.weight"], np.einsum("hwio->oihw", stem))
    query = leaf(PARAMS, "attention/query/kernel")
    np.testing.assert_array_equal(state["attention.query.weight"], query.reshape(8, 8).T)
    out = leaf(PARAMS, "attention/out/kernel")
    np.testing.assert_array_equal(state["attention.out.weight"], out.reshape(8, 8).T)
    assert all(array.flags.c_contiguous for array in state.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    back = from_torch(
        to_torch(params, transposed=()), jax.eval_shape(lambda: params), transposed=()
    )
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_equinox_and_other_names_stay():
    assert torch_name("a/weight") == "a.weight"
    state = to_torch({"a": {"weight": normal(4, 8)}, "gamma": normal(3)})
    assert state["a.weight"].shape == (4, 8)
    assert state["gamma"].shape == (3,)


def test_packed_leaves_are_dense_zeros():
    state = to_torch(prune_and_pack(PARAMS, PLAN), transposed=())
    pruned = to_torch(nmjax.prune(PARAMS, PLAN), transposed=())
    assert state.keys() == pruned.keys()
    for name in state:
        np.testing.assert_array_equal(state[name], pruned[name])


def test_files_that_anything_reads(tmp_path):
    save_torch(tmp_path / "x", prune_and_pack(PARAMS, PLAN), transposed=())
    expected = to_torch(nmjax.prune(PARAMS, PLAN), transposed=())
    loaded = safetensors.numpy.load_file(tmp_path / "x")
    assert loaded.keys() == expected.keys()
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, expected[name])
    _, metadata = read_tensors(tmp_path / "x")
    assert metadata["format"] == "pt"
    assert json.loads(metadata["nmjax"]) == {
        "format": "dense",
        "version": 1,
        "patterns": {
            **{f"attention.{name}.weight": "2:4" for name in ("query", "key", "value", "out")},
            "head.weight": "1x2@0.5",
            "stem.weight": "2:4",
        },
    }
    back = from_torch(loaded, PARAMS, transposed=())
    jax.tree.map(np.testing.assert_array_equal, back, nmjax.prune(PARAMS, PLAN))


# Masks


def test_masks_there_and_back():
    masks = nmjax.compute_masks(PARAMS, PLAN)
    as_floats = map_named(
        lambda name, x: masks[name].astype(x.dtype) if name in masks else x, PARAMS
    )
    state = {f"{name}_mask": array for name, array in to_torch(as_floats, transposed=()).items()}
    loaded = masks_from_torch(state, PARAMS, PLAN, transposed=())
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name].dtype == bool
        np.testing.assert_array_equal(loaded[name], mask)
    state["head.weight_mask"] = state["head.weight_mask"] * 0.5
    with pytest.raises(ValueError, match=r"head\.weight_mask is not a mask"):
        masks_from_torch(state, PARAMS, PLAN, transposed=())
    del state["head.weight_mask"]
    with pytest.raises(ValueError, match=r"head/kernel: no entry 'head\.weight_mask'"):
        masks_from_torch(state, PARAMS, PLAN, transposed=())


# What is refused


def test_states_that_do_not_fit():
    state = to_torch(PARAMS, transposed=())
    state["head.weight"] = state["head.weight"].T
    del state["stem.bias"]
    with pytest.raises(ValueError, match="the state dict does not match") as error:
        from_torch(state, PARAMS, transposed=())
    message = str(error.value)
    assert "stem/bias: no entry 'stem.bias'" in message
    assert "head/kernel of shape (8, 6): 'head.weight' should have shape (6, 8), got" in message
    assert "attention" not in message


def test_entries_left_over():
    state = {
        **to_torch(PARAMS, transposed=()),
        "more.weight": np.ones(2),
        "norm.num_batches_tracked": np.ones(()),
    }
    with pytest.raises(ValueError, match=r"no leaf uses these entries: \['more\.weight'\]"):
        from_torch(state, PARAMS, transposed=())
    back = from_torch(state, PARAMS, ignore="^more", transposed=())
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_other_names():
    state = {f"net.{name}": array for name, array in to_torch(PARAMS, transposed=()).items()}
    back = from_torch(state, PARAMS, names=lambda name: f"net.{torch_name(name)}", transposed=())
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_other_names_both_ways(tmp_path):
    def names(name):
        return {"head/kernel": "classifier.weight"}.get(name, f"net.{torch_name(name)}")

    packed = nmjax.pack(nmjax.prune(PARAMS, PLAN), PLAN)
    state = to_torch(packed, names=names, transposed=())
    plain = to_torch(packed, transposed=())
    assert state.keys() == {
        "classifier.weight" if name == "head.weight" else f"net.{name}" for name in plain
    }
    np.testing.assert_array_equal(state["classifier.weight"], plain["head.weight"])
    back = from_torch(state, PARAMS, names=names, transposed=())
    jax.tree.map(np.testing.assert_array_equal, back, nmjax.prune(PARAMS, PLAN))
    save_torch(tmp_path / "x", packed, names=names, transposed=())
    tensors, metadata = read_tensors(tmp_path / "x")
    assert tensors.keys() == state.keys()
    assert json.loads(metadata["nmjax"])["patterns"]["classifier.weight"] == "1x2@0.5"
    with pytest.raises(ValueError, match="would both become 'x'"):
        to_torch(PARAMS, names=lambda name: "x", transposed=())


def test_collections_of_flax_have_no_prefix():
    variables = {
        "params": {"Dense_0": {"kernel": normal(8, 4)}, "BatchNorm_0": {"scale": normal(4)}},
        "batch_stats": {"BatchNorm_0": {"mean": normal(4), "var": normal(4)}},
    }
    state = to_torch(variables)
    assert state.keys() == {
        "Dense_0.weight",
        "BatchNorm_0.weight",
        "BatchNorm_0.running_mean",
        "BatchNorm_0.running_var",
    }
    jax.tree.map(np.testing.assert_array_equal, from_torch(state, variables), variables)
    assert to_torch({"params": variables["params"]}).keys() < state.keys()
    plan = nmjax.make_plan(variables, "2:4")
    masks = masks_from_torch({"Dense_0.weight_mask": np.ones((4, 8))}, variables, plan)
    assert masks.keys() == {"params/Dense_0/kernel"}
    # Here `params` is a module beside others.
    others = {"params": {"kernel": normal(8, 4)}, "head": {"kernel": normal(8, 4)}}
    assert to_torch(others).keys() == {"params.weight", "head.weight"}
    assert to_torch({"params": normal(3)}).keys() == {"params"}


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_numbers_that_jax_would_narrow(library):
    with jax.enable_x64(False):
        check_what_is_narrowed(library)


def check_what_is_narrowed(library):
    convert = np.asarray if library == "numpy" else pytest.importorskip("torch").from_numpy
    params = {"kernel": jnp.zeros((8, 4)), "steps": jnp.zeros((), jnp.int32)}
    state = {"weight": convert(RNG.normal(size=(4, 8))), "steps": convert(np.array(7))}
    with pytest.raises(ValueError, match=r"the entry weight contains float64 .*jax_enable_x64"):
        from_torch(state, params)
    with jax.enable_x64(True):
        loaded = from_torch(state, params)
        assert loaded["kernel"].dtype == jnp.float64
        np.testing.assert_array_equal(loaded["kernel"], np.asarray(state["weight"]).T)
        assert loaded["steps"].dtype == jnp.int64
    state["weight"] = convert(np.asarray(state["weight"], np.float32))
    assert from_torch(state, params)["steps"] == 7
    state["steps"] = convert(np.array(2**40))
    with pytest.raises(ValueError, match="the entry steps contains int64"):
        from_torch(state, params)


def test_a_plan_of_other_params_has_no_masks():
    with pytest.raises(ValueError, match=r"the plan names leaves .*attention/key/kernel"):
        masks_from_torch({}, {"head": PARAMS["head"]}, PLAN)


def test_stacks_have_no_layout():
    stack = {"kernel": normal(3, 8, 4), "bias": normal(3, 4)}
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 8, 4\): is a stack of layers"):
        to_torch(stack)
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 8, 4\): unknown axes"):
        to_torch({"kernel": normal(3, 8, 4)})


def test_two_leaves_of_one_name():
    with pytest.raises(ValueError, match=r"would both become 'a\.weight'"):
        to_torch({"a": {"kernel": normal(8, 4), "scale": normal(4)}})


# PyTorch itself


@needs_torch
def test_torch_computes_the_same():
    """Convolution, normalization and matrix, pruned, from Flax to PyTorch."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), padding=1, name="conv")(x))
            return nn.Dense(6, name="head")(nn.LayerNorm(epsilon=1e-5, name="norm")(x.mean((1, 2))))

    x = normal(2, 6, 6, 4)
    network = Network()
    params = jax.jit(network.init)(jax.random.key(0), x)["params"]
    params = nmjax.prune(params, nmjax.make_plan(params, "2:4"))
    state = {
        name: torch.from_numpy(array.copy())
        for name, array in to_torch(params, transposed=()).items()
    }

    modules = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(4, 8, 3, padding=1),
            "norm": torch.nn.LayerNorm(8),
            "head": torch.nn.Linear(8, 6),
        }
    )
    modules.load_state_dict(state)
    with torch.no_grad():
        y = modules["conv"](torch.from_numpy(np.asarray(x).copy()).permute(0, 3, 1, 2)).relu()
        y = modules["head"](modules["norm"](y.mean((2, 3))))
    np.testing.assert_allclose(y, network.apply({"params": params}, x), rtol=1e-4, atol=1e-5)
    back = from_torch(modules.state_dict(), params, transposed=())
    jax.tree.map(np.testing.assert_array_equal, back, params)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_of_torch(dtype):
    linear = torch.nn.Linear(8, 4, dtype=getattr(torch, dtype))
    params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
    loaded = from_torch(linear.state_dict(), params)
    assert loaded["kernel"].dtype == dtype
    expected = linear.weight.detach().float().numpy().T.copy()
    np.testing.assert_array_equal(loaded["kernel"].astype("float32"), expected)
    with torch.no_grad():
        linear.weight.zero_()
    np.testing.assert_array_equal(loaded["kernel"].astype("float32"), expected)


@needs_torch
def test_masks_of_torch_prune():
    linear = torch.nn.Linear(8, 4)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]] * 4)
    torch.nn.utils.prune.custom_from_mask(linear, "weight", mask)
    params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
    plan = nmjax.make_plan(params, "2:4")
    state = linear.state_dict()
    assert set(state) == {"bias", "weight_orig", "weight_mask"}
    masks = masks_from_torch(state, params, plan)
    np.testing.assert_array_equal(masks["kernel"], mask.numpy().T)
    names = {"kernel": "weight_orig", "bias": "bias"}
    loaded = from_torch(state, params, names=names.get, ignore="_mask$")
    packed = nmjax.pack(loaded, plan, masks)
    np.testing.assert_array_equal(nmjax.unpack(packed)["kernel"], linear.weight.detach().numpy().T)


@needs_torch
def test_torch_reads_the_file(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    save_torch(
        tmp_path / "x",
        prune_and_pack(params, nmjax.make_plan(params, "2:4", include="head")),
        transposed=(),
    )
    state = safetensors.torch.load_file(tmp_path / "x")
    weight = state["head.weight"]
    assert weight.dtype == torch.bfloat16
    assert ((weight.reshape(6, 2, 4) != 0).sum(-1) == 2).all()
    safetensors.torch.save_file(state, tmp_path / "y")
    back = from_torch(read_tensors(tmp_path / "y")[0], params, transposed=())
    jax.tree.map(np.testing.assert_array_equal, back, from_torch(state, params, transposed=()))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("x", r"names= must be a function .* got str"),
        ({"a/kernel": "a.weight"}, r"names= must be a function .* got dict"),
        (lambda name: None, "for a/kernel it gave None"),
    ],
)
def test_names_that_are_not_a_function_to_text(names, message):
    with pytest.raises(TypeError, match=message):
        to_torch({"a": {"kernel": jnp.ones((4, 2))}}, names=names)

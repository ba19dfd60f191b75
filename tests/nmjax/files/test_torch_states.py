"""State dicts of PyTorch's layers: groups run along what the layer sums over.

The oracle runs the layer. Where only one input feature is not zero, only the weights of that
feature have a gradient, so they show the axis.
"""

import re

import numpy as np
import pytest

import nmjax
from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.tensor_files import write_tensors
from nmjax.trees.leaves import named_leaves

torch = pytest.importorskip("torch", reason="pip install 'nmjax[torch]'")
nn = torch.nn
parametrized = torch.nn.utils.parametrizations.weight_norm
with_gain = torch.nn.utils.weight_norm

FEATURES = 8


def one_feature(feature, *shape, axis):
    """Random numbers in one feature of an input, zeros in the others."""
    x = torch.zeros(*shape)
    x.select(axis, feature).normal_()
    return x


def on_vectors(layer, feature):
    return layer(one_feature(feature, 3, FEATURES, axis=-1))


def on_images(layer, feature):
    space = (5,) * (layer.weight.ndim - 2)
    return layer(one_feature(feature, 2, FEATURES, *space, axis=1))


def on_steps(layer, feature):
    return layer(one_feature(feature, 1, 2, FEATURES, axis=-1))[0]


def on_states(layer, feature):
    state = one_feature(feature, 1, 2, FEATURES, axis=-1)
    states = (state, torch.ones(1, 2, FEATURES)) if isinstance(layer, nn.LSTM) else state
    return layer(torch.ones(1, 2, FEATURES), states)[0]


def on_queries(layer, feature):
    x = one_feature(feature, 3, FEATURES, axis=-1)
    return layer(x, x, x)[0]


def on_heads(layer, feature):
    """Values are the inputs, so each head returns a mean of them."""
    with torch.no_grad():
        layer.in_proj_weight[-FEATURES:] = torch.eye(FEATURES)
        layer.in_proj_bias.zero_()
    return on_queries(layer, feature)


def on_keys(layer, feature):
    """Queries and values are not zero, and have other sizes than keys."""
    return layer(torch.ones(3, 16), one_feature(feature, 4, FEATURES, axis=-1), torch.ones(4, 12))[
        0
    ]


# Layer -> for each weight, a run in which one feature that it meets is not zero.
LAYERS = {
    "Linear": (lambda: nn.Linear(FEATURES, 12), {"weight": on_vectors}),
    "Linear, square": (lambda: nn.Linear(FEATURES, FEATURES), {"weight": on_vectors}),
    "Linear without bias": (
        lambda: nn.Linear(FEATURES, 12, bias=False),
        {"weight": on_vectors},
    ),
    "Conv1d": (lambda: nn.Conv1d(FEATURES, 12, 3), {"weight": on_images}),
    "Conv2d": (lambda: nn.Conv2d(FEATURES, 12, 3), {"weight": on_images}),
    "Conv2d in two groups": (
        lambda: nn.Conv2d(2 * FEATURES, 12, 3, groups=2),
        {"weight": lambda layer, feature: layer(one_feature(feature, 2, 16, 5, 5, axis=1))},
    ),
    "Conv3d": (lambda: nn.Conv3d(FEATURES, 12, (3, 2, 1)), {"weight": on_images}),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(FEATURES, 12, 3), {"weight": on_images}),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(FEATURES, 12, 3), {"weight": on_images}),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(FEATURES, 12, 3), {"weight": on_images}),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(FEATURES, 2),
        {"in_proj_weight": on_queries, "out_proj.weight": on_heads},
    ),
    "MultiheadAttention of three sizes": (
        lambda: nn.MultiheadAttention(16, 2, kdim=FEATURES, vdim=12),
        {"k_proj_weight": on_keys},
    ),
    "LSTM": (
        lambda: nn.LSTM(FEATURES, FEATURES),
        {"weight_ih_l0": on_steps, "weight_hh_l0": on_states},
    ),
    "GRU": (
        lambda: nn.GRU(FEATURES, FEATURES),
        {"weight_ih_l0": on_steps, "weight_hh_l0": on_states},
    ),
    "parametrized weight norm": (
        lambda: parametrized(nn.Linear(FEATURES, 12)),
        {"parametrizations.weight.original1": on_vectors},
    ),
    "parametrized weight norm of Conv2d": (
        lambda: parametrized(nn.Conv2d(FEATURES, 12, 3)),
        {"parametrizations.weight.original1": on_images},
    ),
    "weight norm": (
        lambda: with_gain(nn.Linear(FEATURES, 12)),
        {"weight_v": on_vectors},
    ),
}
# Their shapes may be those of a transposed convolution, or the other way around. A one-dimensional
# convolution may be a bilinear layer.
AMBIGUOUS = {
    "Conv1d": LAYERS["Conv1d"],
    "square Conv2d": (lambda: nn.Conv2d(FEATURES, FEATURES, 3), {"weight": on_images}),
    "Conv2d without bias": (
        lambda: nn.Conv2d(FEATURES, 12, 3, bias=False),
        {"weight": on_images},
    ),
    "square ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(FEATURES, FEATURES, 3),
        {"weight": on_images},
    ),
    "ConvTranspose2d without bias": (
        lambda: nn.ConvTranspose2d(FEATURES, 12, 3, bias=False),
        {"weight": on_images},
    ),
}


def met(layer, weight, run, feature):
    """The weights that meet one input feature."""
    with torch.nn.utils.parametrize.cached():
        out = run(layer, feature)
        # A direction has its gradient through the norm, too. The weight has the same axes.
        is_direction = weight.endswith(("original1", "_v"))
        used = layer.weight if is_direction else layer.get_parameter(weight)
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), used)
    return gradient.numpy() != 0


def reduction_axis(layer, weight, run):
    """The axis along which each input feature meets the weights of one index."""
    ndim = layer.get_parameter(weight).ndim
    found = set(range(-ndim, 0))
    for feature in range(3):
        indices = np.nonzero(met(layer, weight, run, feature))
        assert len(indices[0])
        found &= {axis - ndim for axis in range(ndim) if set(indices[axis]) == {feature}}
    (axis,) = found
    return axis


def as_flat(state, path):
    return state


def as_safetensors(state, path):
    write_tensors(path, state, {"format": "pt"})
    return read_checkpoint(path)


def as_npz(state, path):
    np.savez(path.with_suffix(".npz"), **state)
    return read_checkpoint(path.with_suffix(".npz"))


FORMS = [as_flat, as_safetensors, as_npz]


def state_of(layer, module="layer"):
    return {f"{module}.{name}": x.detach().numpy().copy() for name, x in layer.state_dict().items()}


def torch_names(tree):
    return {name.replace("/", "."): leaf for name, leaf in named_leaves(tree).items()}


def load(layer, params):
    state = {
        name.partition(".")[2]: torch.from_numpy(np.array(leaf))
        for name, leaf in torch_names(params).items()
    }
    layer.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # State dicts still have it.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_groups_run_along_the_inputs(name, form, tmp_path):
    make, weights = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    params = form(state_of(layer, "conv" if name == "Conv1d" else "layer"), tmp_path / "x")
    plan = nmjax.make_plan(params, "2:4")
    planned = {name.partition(".")[2]: leaf for name, leaf in torch_names(dict(plan)).items()}
    axes = {weight: reduction_axis(layer, weight, run) for weight, run in weights.items()}
    for weight, axis in axes.items():
        assert planned[weight].reduction_axes == (axis,)
    others = planned.keys() - axes.keys()
    assert others <= {"q_proj_weight", "v_proj_weight", "out_proj.weight"}
    load(layer, nmjax.prune(params, plan))
    for weight, axis in axes.items():
        pruned = np.moveaxis(layer.get_parameter(weight).detach().numpy(), axis, -1)
        kept = (pruned.reshape(*pruned.shape[:-1], -1, 4) != 0).sum(-1)
        np.testing.assert_array_equal(kept, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_shapes_are_refused(name, form, tmp_path):
    make, weights = AMBIGUOUS[name]
    layer = make()
    params = form(state_of(layer), tmp_path / "x")
    with pytest.raises(ValueError, match="unknown axes") as error:
        nmjax.make_plan(params, "2:4")
    assert re.search(rf"layer.weight {re.escape(str(tuple(layer.weight.shape)))}", str(error.value))
    axis = reduction_axis(layer, "weight", weights["weight"])
    plan = nmjax.make_plan(params, "2:4", axes={"layer.weight": axis})
    assert [leaf.reduction_axes for leaf in plan.values()] == [(axis,)]


# An image of the size of the kernel gives one output; an image of one pixel gives all taps.
SIZES = {"Linear": (), "Conv1d": (3,), "Conv2d": (3, 3), "Conv3d": (3, 2, 1)}
SIZES |= {f"ConvTranspose{n}d": (1,) * n for n in (1, 2, 3)}
SIZES |= {"parametrized weight norm": (), "parametrized weight norm of Conv2d": (3, 3)}


@pytest.mark.parametrize("name", SIZES)
def test_each_output_depends_on_two_of_four_inputs(name):
    layer = LAYERS[name][0]()
    state = state_of(layer, "conv" if name == "Conv1d" else "layer")
    load(layer, nmjax.prune(state, nmjax.make_plan(state, "2:4")))
    x = torch.ones(1, FEATURES, *SIZES[name])
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)
    jacobian = jacobian.squeeze(layer(x).ndim - 1).numpy()
    by_input = np.moveaxis(jacobian, jacobian.ndim - 1 - len(SIZES[name]), -1)
    kept = (by_input.reshape(*by_input.shape[:-1], -1, 4) != 0).sum(-1)
    np.testing.assert_array_equal(kept, 2)


@pytest.mark.parametrize("form", FORMS)
def test_tables_and_gains_stay_dense(form, tmp_path):
    layer = nn.ModuleDict(
        {
            "token_embedding": nn.Embedding(16, 8),
            "norm": nn.LayerNorm(8),
            "batch_norm": nn.BatchNorm2d(8),
            "gain": parametrized(nn.Linear(8, 4)),
        }
    )
    params = form(state_of(layer), tmp_path / "x")
    plan = nmjax.make_plan(params, "2:4", on_unknown="dense")
    assert torch_names(dict(plan)).keys() == {"layer.gain.parametrizations.weight.original1"}

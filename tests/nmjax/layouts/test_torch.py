"""Layouts of PyTorch's layers, judged by what the layers compute."""

import math

import numpy as np
import pytest

from nmjax.layouts import Axes, Unknown, layouts
from tests.nmjax.oracle import disagreement, split

torch = pytest.importorskip("torch")
nn = torch.nn


def shapes_of(module, prefix=""):
    return {prefix + name: tuple(leaf.shape) for name, leaf in module.state_dict().items()}


def connections(module, leaf, x, positions=()):
    """What each entry of a parameter connects, as `tests.nmjax.oracle.connections`."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    params |= {name: torch.zeros_like(p) for name, p in params.items() if name.endswith("bias")}

    def outputs(weight, x):
        return torch.func.functional_call(module, {**params, leaf: weight}, (x[None],))[0]

    weight = params[leaf]
    slopes = torch.func.jacfwd(torch.func.jacfwd(outputs, 1), 0)(weight, x)
    met = slopes.detach().numpy() != 0
    y_shape = tuple(outputs(weight, x).shape)
    met = met.reshape(*y_shape, *x.shape, *weight.shape)
    return split(met, y_shape, tuple(x.shape), tuple(weight.shape), positions)


# Layer, its input, groups, and where the axes are certain: with a bias ("b"), without one ("-"),
# and both in a layer named conv ("B", "_").
LAYERS = {
    "Linear": (lambda b: nn.Linear(6, 5, bias=b), (6,), 1, "b-B_"),
    "square Linear": (lambda b: nn.Linear(6, 6, bias=b), (6,), 1, "b-B_"),
    "Conv1d": (lambda b: nn.Conv1d(4, 6, 3, bias=b), (4, 3), 1, "B_"),
    "Conv2d": (lambda b: nn.Conv2d(4, 6, 3, bias=b), (4, 3, 3), 1, "bB_"),
    "Conv2d of a whole multiple": (lambda b: nn.Conv2d(3, 6, 3, bias=b), (3, 3, 3), 1, "B_"),
    "square Conv2d": (lambda b: nn.Conv2d(4, 4, 3, bias=b), (4, 3, 3), 1, "B_"),
    "Conv3d": (lambda b: nn.Conv3d(3, 4, 2, bias=b), (3, 2, 2, 2), 1, "bB_"),
    "Conv2d in groups": (lambda b: nn.Conv2d(6, 8, 2, groups=2, bias=b), (6, 2, 2), 2, "bB_"),
    "depthwise": (lambda b: nn.Conv2d(4, 4, 3, groups=4, bias=b), (4, 3, 3), 4, "B_"),
}
TRANSPOSED = {
    "ConvTranspose1d": (lambda b: nn.ConvTranspose1d(4, 6, 3, bias=b), (4, 1), 1, "b"),
    "ConvTranspose2d": (lambda b: nn.ConvTranspose2d(4, 6, 3, bias=b), (4, 1, 1), 1, "b"),
    "square": (lambda b: nn.ConvTranspose2d(4, 4, 3, bias=b), (4, 1, 1), 1, ""),
    "halving": (lambda b: nn.ConvTranspose2d(6, 3, 2, bias=b), (6, 1, 1), 1, "b"),
    "in groups": (lambda b: nn.ConvTranspose2d(8, 8, 2, groups=2, bias=b), (8, 1, 1), 2, ""),
    "in groups, more": (lambda b: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=b), (4, 1, 1), 2, ""),
}


@pytest.mark.parametrize("kind", [*LAYERS, *TRANSPOSED])
def test_layers(kind):
    make, x_shape, groups, certain = (LAYERS | TRANSPOSED)[kind]
    positions = tuple(range(1, len(x_shape)))
    met = connections(make(False), "weight", torch.randn(x_shape), positions)
    named = "deconv" if kind in TRANSPOSED else "conv"
    for letter, bias, prefix in (
        ("b", True, "layer."),
        ("-", False, "layer."),
        ("B", True, f"block.{named}1."),
        ("_", False, f"block.{named}1."),
    ):
        shapes = {"block.norm.weight": (7,), **shapes_of(make(bias), prefix)}
        found = layouts(shapes)[f"{prefix}weight"]
        taps = math.prod(met.shape[6:])
        assert disagreement(found, met, groups=groups, taps=taps) == ""
        expected = letter.lower() if kind in TRANSPOSED and letter != "_" else letter
        assert (expected in certain) == (not isinstance(found, Unknown)), (letter, found)


def test_bilinear_layers_look_like_convolutions():
    shapes = shapes_of(nn.Bilinear(3, 4, 5), "layer.")
    assert shapes["layer.weight"] == (5, 3, 4)
    assert isinstance(layouts(shapes)["layer.weight"], Unknown)


def test_attention_with_one_matrix_or_three():
    for layer in (nn.MultiheadAttention(6, 2), nn.MultiheadAttention(6, 2, kdim=3, vdim=4)):
        shapes = shapes_of(layer, "attn.")
        found = layouts(shapes)
        matrices = [name for name in shapes if "weight" in name]
        assert {found[name] for name in matrices} == {Axes((-1,), (-2,))}
        assert {found[name] for name in shapes.keys() - set(matrices)} == {"bias"}
    # In (out, in), columns belong to inputs: without the column, the input has no effect.
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight[:, 2] = 0
    x = torch.randn(1, 3, 6)
    changed = x.clone()
    changed[:, :, 2] += 1
    np.testing.assert_allclose(
        *(layer(x, x, x)[0].detach().numpy() for x in (x, changed)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, 2, bidirectional=True),
        nn.LSTM(3, 4, proj_size=2),
        nn.GRU(3, 4),
        nn.RNN(3, 4),
        nn.LSTMCell(3, 4),
        nn.GRUCell(3, 4),
    ],
)
def test_recurrent_layers(layer):
    found = layouts(shapes_of(layer, "rnn."))
    for name, axes in found.items():
        assert axes == ("bias" if "bias" in name else Axes((-1,), (-2,))), name


def test_weight_norm_has_a_gain_and_a_direction():
    from torch.nn.utils import parametrizations

    layer = parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    found = layouts(shapes_of(layer, "conv."))
    assert found["conv.parametrizations.weight.original0"] == "gain of a weight normalization"
    direction = found["conv.parametrizations.weight.original1"]
    assert direction == Axes((-3,), (-4,), (-2, -1))


@pytest.mark.filterwarnings("ignore")
def test_weight_norm_of_old():
    found = layouts(shapes_of(torch.nn.utils.weight_norm(nn.Linear(4, 6)), "fc."))
    assert found == {
        "fc.bias": "bias",
        "fc.weight_g": "gain of a weight normalization",
        "fc.weight_v": Axes((-1,), (-2,)),
    }


def test_spectral_norm_new_and_old():
    from torch.nn.utils import parametrizations

    found = layouts(shapes_of(parametrizations.spectral_norm(nn.Linear(4, 6)), "fc."))
    assert found["fc.parametrizations.weight.original"] == Axes((-1,), (-2,))
    found = layouts(shapes_of(torch.nn.utils.spectral_norm(nn.Linear(4, 6)), "fc."))
    assert found["fc.weight_orig"] == Axes((-1,), (-2,))
    assert found["fc.weight_u"] == found["fc.weight_v"] == "1-D"


def test_other_parametrizations_derive_the_weight():
    from torch.nn.utils import parametrizations

    found = layouts(shapes_of(parametrizations.orthogonal(nn.Linear(4, 6)), "fc."))
    assert isinstance(found["fc.parametrizations.weight.original"], Unknown)


def test_pruned_layers_keep_their_mask_dense():
    from torch.nn.utils import prune

    layer = prune.l1_unstructured(nn.Linear(4, 6), "weight", 0.5)
    found = layouts(shapes_of(layer, "fc."))
    assert found["fc.weight_mask"] == "mask"
    assert found["fc.weight_orig"] == Axes((-1,), (-2,))


def test_norms_of_several_axes():
    found = layouts(shapes_of(nn.LayerNorm((3, 4)), "anything."))
    assert found == {"anything.weight": "normalization", "anything.bias": "bias"}


@pytest.mark.parametrize(
    ("first", "axes"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), Axes((-3,), (-4,), (-2, -1))),
        (nn.ConvTranspose2d(4, 6, 3, bias=False), Axes((-4,), (-3,), (-2, -1))),
        (nn.Conv2d(6, 6, 3, bias=False), None),
    ],
)
def test_the_norm_that_follows_corroborates(first, axes):
    shapes = shapes_of(nn.Sequential(first, nn.BatchNorm2d(6)), "block.")
    found = layouts(shapes)["block.0.weight"]
    assert found == axes if axes else isinstance(found, Unknown)
    del shapes["block.1.weight"]
    assert isinstance(layouts(shapes)["block.0.weight"], Unknown)


def test_a_stack_of_modules():
    layers = [nn.Linear(4, 6) for _ in range(3)]
    params, _ = torch.func.stack_module_state(layers)
    shapes = {f"fc.{name}": tuple(p.shape) for name, p in params.items()}
    assert layouts(shapes)["fc.weight"] == Axes((-1,), (-2,))
    shapes.pop("fc.bias")
    assert isinstance(layouts(shapes)["fc.weight"], Unknown)

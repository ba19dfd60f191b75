"""Path rules that say how parameters are split, and what follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments.distributed.layout import make_layout, parse_mesh


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "attention": {"out": {"kernel": shape(2, 4, 16)}},
    "head": {"kernel": shape(16, 10), "bias": shape(8)},
}


def specs(layout):
    return {name: spec for name, _, spec in layout.specs}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_any_axes(axis_type):
    mesh = parse_mesh("data=2,model=2,z=1", axis_type)
    assert dict(mesh.shape) == {"data": 2, "model": 2, "z": 1}
    assert mesh.axis_types == (axis_type,) * 3
    assert mesh.devices.size == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "a mesh is NAME=SIZE"),
        ("data=0", "positive sizes"),
        ("data=2,data=2", "distinct names"),
        ("data=2,=2", "got 'data=2,=2'"),
        ("data=3", "has 3 devices, which does not divide the 8 present"),
        ("data=16", "choose sizes whose product is 8 or divides it"),
    ],
)
def test_texts_that_are_not_a_mesh(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_presets():
    mesh = parse_mesh("data=4,model=2")
    whole = P(None, None, None), P(None), P(None, None)
    expected = {
        "data": whole,
        # 10 is not a multiple of 4: that kernel stays whole.
        "fsdp": (P(None, None, ("data",)), P(("data",)), whole[2]),
        "tensor": (P(None, None, ("model",)), whole[1], P(None, ("model",))),
    }
    for preset, (out, bias, head) in expected.items():
        assert specs(make_layout(mesh, PARAMS, preset=preset)) == {
            "attention/out/kernel": out,
            "head/bias": bias,
            "head/kernel": head,
        }


def test_the_first_rule_that_matches_holds_before_the_preset():
    mesh = parse_mesh("data=2,model=2")
    rules = ("out/kernel=model,*,data", "kernel=data+model,*")
    assert specs(make_layout(mesh, PARAMS, preset="fsdp", rules=rules)) == {
        "attention/out/kernel": P(("model",), None, ("data",)),
        "head/kernel": P(("data", "model"), None),
        "head/bias": P(("data",)),
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("kernel",), "a rule is REGEX=AXES, such as 'kernel=.,model', got 'kernel'"),
        (("=model",), "a rule is REGEX=AXES"),
        (("kernel=batch",), "must name axes of the mesh .data, model., each at most once"),
        (("kernel=model,model",), "at most once, got model, model"),
        (("stem=model",), "match no leaf: 'stem'"),
        (("(=model",), "is not a regular expression"),
        (("bias=*,model",), "head/bias .8,.: the rule names 2 axes"),
        (("kernel=data+model",), "head/kernel .16, 10.: axis -1 does not split evenly into 4"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(ValueError, match=message):
        make_layout(parse_mesh("data=2,model=2"), PARAMS, rules=rules)


def test_batches_are_split_over_axes_of_the_mesh():
    mesh = parse_mesh("data=2,model=2")
    with pytest.raises(ValueError, match="--batch-axes must name axes of the mesh"):
        make_layout(mesh, PARAMS, batch_axes=("rows",))
    assert make_layout(mesh, PARAMS, batch_axes=("data", "model")).batch_shards == 4


def test_what_is_named_and_shaped_as_a_parameter_lies_as_it_does():
    layout = make_layout(parse_mesh("data=2,model=2"), PARAMS, rules=("head/kernel=model,*",))

    def spec(name, *sizes):
        return layout.sharding(name, sizes).spec

    assert spec("train/opt_state/1/trace/head/kernel", 16, 10) == P(("model",), None)
    # Three seeds, or layers under nn.scan.
    assert spec("topology/first/head/kernel", 3, 16, 10) == P(None, ("model",), None)
    assert spec("sad/head/kernel") == P()
    assert spec("rows/head/kernel", 4) == P()
    assert spec("train/step") == P()
    assert spec("overhead/kernel", 16, 10) == P()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_results_are_put_where_they_belong(axis_type):
    mesh = parse_mesh("data=4,model=2", axis_type)
    layout = make_layout(mesh, PARAMS, preset="tensor")
    with jax.set_mesh(mesh):
        made = jax.jit(lambda: layout.constrain({"m": {"head/kernel": jnp.ones((16, 10))}}))()
    kernel = made["m"]["head/kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 5)}
    like = layout.place_like({"head/kernel": kernel, "step": jnp.int32(3)})
    assert like["head/kernel"].sharding == kernel.sharding
    assert like["step"].sharding.is_fully_replicated
    np.testing.assert_array_equal(kernel, 1)


def test_a_layout_is_a_key_and_a_table():
    mesh = parse_mesh("data=4,model=2")
    layout, same = (make_layout(mesh, PARAMS, preset="tensor") for _ in range(2))
    assert layout == same
    assert hash(layout) == hash(same)
    assert layout != make_layout(mesh, PARAMS)
    lines = str(layout).splitlines()
    assert lines[0] == "mesh data=4, model=2; batches split over data"
    assert lines[2] == "  attention/out/kernel  (2, 4, 16)  *,*,model  (2, 4, 8)"
    assert lines[3] == "  head/bias             (8,)  *  (8,)"

"""Packed files: exact round trips, and nothing believed that a file says."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import load_packed, save_packed
from nmjax.files.tensor_files import read_tensors, write_tensors
from nmjax.trees.leaves import named_leaves
from tests.nmjax.float_bits import DTYPES, any_bits, bits_of
from tests.nmjax.packed_weights import prune_and_pack

RNG = np.random.default_rng(0)
SHAPES = {
    "conv": {"kernel": (3, 3, 8, 4), "bias": (4,)},
    "out": {"kernel": (2, 4, 8)},
    "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
    "dense": {"kernel": (12, 4)},
    "scale": (),
}
RULES = {"conv": "1x4@0.6", "dense": "1x2@0.5/layer"}


def make_packed(dtype="float32"):
    params = jax.tree.map(
        lambda shape: any_bits(RNG, shape, dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    return prune_and_pack(params, nmjax.make_plan(params, "4:8", rules=RULES))


PACKED = make_packed()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits_of(x), bits_of(y)), a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    packed = make_packed(dtype)
    save_packed(tmp_path / "x.safetensors", packed)
    loaded = load_packed(str(tmp_path / "x.safetensors"))
    assert_same_bits(loaded, packed)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))
    assert_same_bits(nmjax.unpack(loaded), nmjax.unpack(packed))


def test_stacked_layers(tmp_path):
    stack = nmjax.unpack(PACKED)
    stack = jax.tree.map(lambda x: jnp.stack([x, -x, x]), stack)
    plan = nmjax.make_plan(nmjax.unpack(PACKED), "4:8", rules=RULES)
    packed = prune_and_pack(stack, plan)
    save_packed(tmp_path / "x", packed)
    assert_same_bits(load_packed(tmp_path / "x"), packed)


def test_the_file_is_little_more_than_the_bytes(tmp_path):
    params = {"kernel": jnp.ones((256, 256), jnp.bfloat16)}
    save_packed(tmp_path / "x", prune_and_pack(params, nmjax.make_plan(params, "2:4")))
    assert (tmp_path / "x").stat().st_size <= 0.5626 * 256 * 256 * 2 + 512
    tensors, _ = read_tensors(tmp_path / "x")
    assert sum(x.nbytes for x in tensors.values()) <= 0.5626 * 256 * 256 * 2


def test_one_array_is_a_tree(tmp_path):
    save_packed(tmp_path / "x", PACKED["dense"]["kernel"])
    assert_same_bits(load_packed(tmp_path / "x"), PACKED["dense"]["kernel"])


def test_other_containers_come_back_as_dicts(tmp_path):
    kernel, bias = PACKED["dense"]["kernel"], jnp.ones(2)
    boxed = {"a": [{"kernel": nn.Partitioned(kernel, ("in", "out"))}, (bias,)], "b/c": bias}
    save_packed(tmp_path / "x", boxed)
    expected = {"a": {"0": {"kernel": kernel}, "1": {"0": bias}}, "b": {"c": bias}}
    assert_same_bits(load_packed(tmp_path / "x"), expected)


def test_equal_trees_make_equal_files(tmp_path):
    save_packed(tmp_path / "x", PACKED)
    save_packed(tmp_path / "y", load_packed(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


# What cannot be saved


@pytest.mark.parametrize(
    ("tree", "error", "complaint"),
    [
        ({"a": "text", "b": 1.0}, TypeError, r"no leaf is an array: \['a', 'b'\]"),
        ({"a": np.array([None])}, TypeError, "a cannot be saved: it has no numbers"),
        ({"a": {"b": jax.ShapeDtypeStruct((2,), "float32")}}, TypeError, "a/b cannot be saved"),
        (jax.eval_shape(lambda: PACKED), TypeError, "conv/bias cannot be saved"),
        ({"a": jax.eval_shape(lambda: jax.random.key(0))}, TypeError, "a cannot be saved"),
        ({"a": jnp.ones(2), "a/b": jnp.ones(2)}, ValueError, "'a/b' is below another leaf"),
        ({"a/b": jnp.ones(2), "a": jnp.ones(2)}, ValueError, "is below another leaf"),
        (
            {"k": PACKED["dense"]["kernel"], "k/values": jnp.ones(2)},
            ValueError,
            "is below another leaf",
        ),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, tree, error, complaint):
    with pytest.raises(error, match=complaint):
        save_packed(tmp_path / "x", tree)
    assert not list(tmp_path.iterdir())


def test_leaves_without_values_are_named(tmp_path):
    donated = jnp.ones(3)
    donated.delete()
    with pytest.raises(TypeError, match=r"a/b cannot be saved: .*deleted"):
        save_packed(tmp_path / "x", {"a": {"b": donated}})
    with pytest.raises(TypeError, match=r"kernel cannot be saved: .*traced|Tracer"):
        jax.jit(lambda x: save_packed(tmp_path / "x", {"kernel": x}))(jnp.ones(3))
    assert not list(tmp_path.iterdir())


def test_packed_leaves_that_pack_could_not_have_made(tmp_path):
    wrong = jax.tree.map(lambda x: x, PACKED)
    codes = wrong["out"]["kernel"].codes
    wrong["out"]["kernel"] = nmjax.PackedNM(
        wrong["out"]["kernel"].values, codes | 255, wrong["out"]["kernel"].leaf_plan
    )
    with pytest.raises(ValueError, match=r"out/kernel is not what nmjax\.pack makes: the codes"):
        save_packed(tmp_path / "x", wrong)


def test_exported_programs_take_packed_arguments():
    exported = jax.export.export(jax.jit(nmjax.unpack))(PACKED)
    again = jax.export.deserialize(bytearray(exported.serialize()))
    assert again.in_tree == exported.in_tree
    assert_same_bits(again.call(PACKED), nmjax.unpack(PACKED))


# What cannot be loaded


@pytest.fixture
def parts(tmp_path):
    """Tensors and header of a good file, and a function that loads them once changed."""
    save_packed(tmp_path / "x", PACKED)
    tensors, metadata = read_tensors(tmp_path / "x")
    manifest = json.loads(metadata["nmjax"])

    def load():
        write_tensors(tmp_path / "y", tensors, {"nmjax": json.dumps(manifest)})
        return load_packed(tmp_path / "y")

    return tensors, manifest, load


def test_an_unchanged_file_loads(parts):
    assert_same_bits(parts[2](), PACKED)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("version", 4, "version 4, but this nmjax reads version 3"),
        ("version", 2, r"should have the keys .*'keys', 'left_out'"),
        ("version", "1", "the version is a str"),
        ("version", True, "the version is a bool"),
        ("format", "dense", "has no packed parameters"),
        ("leaves", [], "the leaves is a list"),
        ("extra", 1, "should have the keys"),
    ],
)
def test_headers_that_are_refused(parts, key, value, complaint):
    parts[1][key] = value
    with pytest.raises(ValueError, match=complaint):
        parts[2]()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("pattern", "2:8", "values of shape"),
        ("pattern", "4:16", "not a multiple of 16"),
        ("pattern", "8:4", "1 <= n <= m"),
        ("pattern", "four", "cannot read 'four'"),
        ("pattern", " 4:8", "cannot have"),
        ("pattern", "1x8@0.5", "values of shape|is missing"),
        ("pattern", "1x" + "9" * 10**6, "cannot read|cannot have|digits"),
        ("pattern", 4, "is a int"),
        ("shape", [2, 4, 16], "values of shape"),
        ("shape", [2, 4, True], "is a bool"),
        ("shape", [2, 4, 8.0], "is a float"),
        ("shape", [2, 4], "cannot have"),
        ("shape", [0, 4, 8], "impossible shape"),
        ("shape", [-2, -4, 8], "impossible shape"),
        ("shape", [2**31, 4, 8], "impossible shape"),
        ("shape", [2**20, 2**20, 8], "impossible shape"),
        ("shape", [10**30, 4, 8], "impossible shape"),
        ("shape", "248", "is a str"),
        ("reduction_axes", [-3], "multiple of 8|values of shape"),
        ("reduction_axes", [-3, -3], "cannot have"),
        ("reduction_axes", [-3, -1], "cannot have"),
        ("reduction_axes", [0, 1], "cannot have"),
        ("reduction_axes", [-4, -3], "cannot have"),
        ("reduction_axes", [], "cannot have"),
        ("tap_axes", [-4], "cannot have"),
        ("output_axes", [-2], "cannot have"),
        ("dtype", "float16", "should have dtype float16"),
        ("dtype", None, "is a NoneType"),
        ("extra", 1, "should have the keys"),
    ],
)
def test_descriptions_that_are_refused(parts, key, value, complaint):
    parts[1]["leaves"]["out/kernel"][key] = value
    with pytest.raises(ValueError, match=complaint):
        parts[2]()


def test_a_block_of_other_taps_is_refused(parts):
    parts[1]["leaves"]["conv/kernel"]["tap_axes"] = [-4]
    with pytest.raises(ValueError, match="values of shape"):
        parts[2]()


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("out/kernel/codes", lambda x: x | 1 << 7, "codes of .* groups do not keep 4 of 8"),
        ("out/kernel/codes", lambda x: x.astype(np.int8), "expected uint8"),
        ("out/kernel/codes", lambda x: x[:, :4], "expected uint8"),
        ("out/kernel/values", lambda x: x[..., :4], "values of shape"),
        ("out/kernel/values", lambda x: x.view(np.int32), "should have dtype float32"),
        ("out/kernel/values", lambda x: np.zeros((0, *x.shape), x.dtype), "has no weights"),
        ("conv/kernel/indices", lambda x: x + 8, "beyond 8 inputs"),
        ("conv/kernel/indices", lambda x: x[:, ::-1], "not ascending"),
        ("conv/kernel/indices", lambda x: x.astype(np.uint16), "expected uint8"),
        ("dense/kernel/row_pointers", lambda x: x + 1, "do not ascend from 0 to 12"),
        ("dense/kernel/row_pointers", lambda x: x[:2], "expected int32"),
        ("dense/kernel/row_pointers", lambda x: x.astype(np.int64), "expected int32"),
    ],
)
def test_tensors_that_are_refused(parts, name, change, complaint):
    parts[0][name] = change(parts[0][name])
    with pytest.raises(ValueError, match=complaint):
        parts[2]()


def test_tensors_that_are_missing_or_too_many(parts):
    tensors, _, load = parts
    codes = tensors.pop("out/kernel/codes")
    with pytest.raises(ValueError, match="the tensor out/kernel/codes is missing"):
        load()
    tensors |= {"out/kernel/codes": codes, "out/kernel": codes}
    with pytest.raises(ValueError, match="two leaves are named 'out/kernel'"):
        load()
    tensors["out/kernel/more"] = tensors.pop("out/kernel")
    with pytest.raises(ValueError, match=r"is below another leaf|leaves are below it"):
        load()


def test_names_that_nest_too_deep(parts):
    parts[0]["/".join(["a"] * 100_000)] = np.zeros(1)
    with pytest.raises(ValueError, match="more than 64 levels"):
        parts[2]()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 100_000, "nested too deeply|Expecting"),
        ("{}", "has no packed"),
        ("[]", "the header is a list"),
        ("{", "Expecting"),
        ('{"format": "packed", "format": "packed"}', "has a key twice"),
        ('{"format": "packed", "version": ' + "9" * 10_000 + "}", "digits"),
        ('{"format": "packed", "version": NaN}', "the version is a float"),
    ],
)
def test_text_that_is_no_manifest(tmp_path, text, complaint):
    write_tensors(tmp_path / "x", {"a": np.ones(2)}, {"nmjax": text})
    with pytest.raises(ValueError, match=complaint):
        load_packed(tmp_path / "x")


def test_other_safetensors_files(tmp_path):
    write_tensors(tmp_path / "x", {"a": np.ones(2)}, {})
    with pytest.raises(ValueError, match="has no packed parameters") as error:
        load_packed(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


@pytest.fixture
def without_x64():
    """JAX narrows 64-bit numbers, whatever the settings of this run of the tests."""
    with jax.enable_x64(False):
        yield


@pytest.mark.usefixtures("without_x64")
@pytest.mark.parametrize("number", [np.int64(2**40), np.uint64(2**32), np.float64(1)])
def test_64_bit_numbers(tmp_path, number):
    save_packed(tmp_path / "x", {"a": {"step": number}})
    with pytest.raises(ValueError, match=f"a/step contains {number.dtype}.*jax_enable_x64"):
        load_packed(tmp_path / "x")
    with jax.enable_x64(True):
        loaded = load_packed(tmp_path / "x")["a"]["step"]
        assert loaded == number
        assert loaded.dtype == number.dtype


@pytest.mark.usefixtures("without_x64")
@pytest.mark.parametrize("number", [2**31 - 1, -(2**31), 0])
def test_64_bit_counters_that_fit_are_kept(tmp_path, number):
    save_packed(tmp_path / "x", {"a": np.array([number, 7]), "b": np.uint64(2**32 - 1)})
    loaded = load_packed(tmp_path / "x")
    assert loaded["a"].tolist() == [number, 7]
    assert (loaded["a"].dtype, loaded["b"].dtype) == (jnp.int32, jnp.uint32)
    assert loaded["b"].tolist() == 2**32 - 1


def test_loading_needs_no_pickle(tmp_path):
    save_packed(tmp_path / "x", PACKED)
    code = (
        "import sys, pickle, nmjax\n"
        "pickle.load = pickle.loads = pickle.Unpickler = None\n"
        f"tree = nmjax.load_packed({str(tmp_path / 'x')!r})\n"
        "print(len(nmjax.trees.leaves.named_leaves(tree)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == len(named_leaves(jax.tree.map(lambda x: x, PACKED)))


# Files of earlier versions


@pytest.mark.parametrize(
    ("text", "shape", "held"),
    [
        ("1x2@0.29", (100, 4), "1x2@0.28"),
        ("1x2@0.57/layer", (100, 8), "1x2@0.57/layer"),  # 228 of 400 in both ways of counting.
        ("1x2@0.58/layer", (50, 4), "1x2@0.57/layer"),
    ],
)
def test_blocks_that_were_counted_in_floating_point(tmp_path, text, shape, held):
    w = jax.random.normal(jax.random.key(0), shape)
    plan = nmjax.make_plan({"kernel": w}, held)
    packed = nmjax.pack(nmjax.prune({"kernel": w}, plan), plan)
    save_packed(tmp_path / "new", packed)
    arrays, header = read_tensors(tmp_path / "new")
    # The file says what the user wrote; its blocks were counted by floor(sparsity * blocks).
    old = {"nmjax": header["nmjax"].replace(held, text)}
    write_tensors(tmp_path / "old", arrays, old)
    if text == held:
        loaded = load_packed(tmp_path / "old")
    else:
        with pytest.warns(UserWarning, match=f"kernel was packed as {text}.*it holds {held}"):
            loaded = load_packed(tmp_path / "old")
    assert loaded["kernel"].leaf_plan.pattern == nmjax.parse_pattern(held)
    np.testing.assert_array_equal(nmjax.unpack(loaded)["kernel"], nmjax.unpack(packed)["kernel"])
    # Another count is a forgery.
    forged = {"nmjax": header["nmjax"].replace(held, text.replace("@0.", "@0.1"))}
    write_tensors(tmp_path / "forged", arrays, forged)
    with pytest.raises(ValueError, match="cannot hold"):
        load_packed(tmp_path / "forged")

"""Patterns: what is accepted, what is refused with which words, and text there and back."""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax import NM, Block1xN, block_mask, parse_pattern
from nmjax.masks.arguments import as_fraction


@st.composite
def patterns(draw):
    m = draw(st.integers(1, 1024))
    n, flatten = draw(st.integers(1, m)), draw(st.sampled_from(["channel", "kernel"]))
    stride = draw(st.sampled_from([1, 2, 16, 10**6])) if flatten == "channel" else 1
    return NM(n, m, flatten=flatten, stride=stride)


@given(patterns())
def test_text_there_and_back(pattern):
    assert parse_pattern(str(pattern)) == pattern


@given(patterns(), patterns())
def test_equality_and_hash_go_by_value(a, b):
    again = NM(a.n, a.m, flatten=a.flatten, stride=a.stride)
    assert a == again
    assert hash(a) == hash(again)
    assert (a == b) == ((a.n, a.m, a.flatten, a.stride) == (b.n, b.m, b.flatten, b.stride))


@given(patterns())
def test_density_and_index_bits(pattern):
    assert pattern.density == pattern.n / pattern.m
    # No encoding of the positions can be shorter: 2 ** bits words tell C(m, n) sets apart.
    sets = math.comb(pattern.m, pattern.n)
    assert pattern.index_bits * pattern.m == pytest.approx(math.log2(sets))


@pytest.mark.parametrize(
    ("pattern", "sets"), [(NM(2, 4), 6), (NM(1, 4), 4), (NM(4, 4), 1), (NM(3, 5), 10)]
)
def test_index_bits_of_counted_sets(pattern, sets):
    counted = len(list(itertools.combinations(range(pattern.m), pattern.n)))
    assert counted == sets
    assert pattern.index_bits == pytest.approx(math.log2(counted) / pattern.m)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        (" 2 : 4 ", NM(2, 4)),
        ("2:4/channel", NM(2, 4)),
        ("2:4/kernel", NM(2, 4, flatten="kernel")),
        ("8:32 / kernel", NM(8, 32, flatten="kernel")),
        ("2:4/16", NM(2, 4, stride=16)),
        ("1:8 / 2", NM(1, 8, stride=2)),
        ("2:4/1", NM(2, 4)),
    ],
)
def test_text_that_parses(text, pattern):
    assert parse_pattern(text) == pattern


def test_a_pattern_passes_through_parsing():
    pattern = NM(2, 4)
    assert parse_pattern(pattern) is pattern


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:", ":4", "2-4", "2:4:8", "-2:4", "2.0:4", "0.5", "2:4/filter", "a:b", "2:4/-2"],
)
def test_text_that_does_not_parse(text):
    check_not_read(text)


@pytest.mark.parametrize("text", ["2:4\n", "２:４", "2:\t4", "٢:٤", "1x4@0.5\n", "1x４@0.5"])
def test_digits_of_other_scripts_and_line_breaks(text):
    check_not_read(text)


def check_not_read(text):
    with pytest.raises(ValueError, match="cannot read") as error:
        parse_pattern(text)
    assert repr(text) in str(error.value)
    assert '"2:4"' in str(error.value)  # The way out.


@pytest.mark.parametrize("value", [None, 2, 0.5, (2, 4), b"2:4", lambda: "2:4"])
def test_what_is_no_pattern_at_all(value):
    with pytest.raises(TypeError, match="a pattern is text"):
        parse_pattern(value)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (-1, 4), (0, 0), (1, 0), (1, -1)])
def test_n_outside_of_1_to_m(n, m):
    with pytest.raises(ValueError, match=f"got n={n}, m={m}"):
        NM(n, m)


@pytest.mark.parametrize("text", ["4:2", "0:4", "0:0"])
def test_the_same_in_text(text):
    with pytest.raises(ValueError, match="1 <= n <= m"):
        parse_pattern(text)


def test_numbers_the_wrong_way_round_get_a_hint():
    with pytest.raises(ValueError, match=r"did you mean 2:4\?"):
        NM(4, 2)


@pytest.mark.parametrize("bad", [True, 2.0, np.float32(2), "2", None, np.array([2, 2])])
@pytest.mark.parametrize("name", ["n", "m", "stride"])
def test_what_is_no_integer(bad, name):
    with pytest.raises(TypeError, match=f"{name} must be a Python integer"):
        NM(**{"n": 2, "m": 4, name: bad})


def test_a_traced_number_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match="inject_hyperparams pass the pattern as text"):
        jax.jit(lambda n: NM(n, 4).density)(2)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_become_python_ones(integer):
    pattern = NM(integer(2), integer(4))
    assert (type(pattern.n), type(pattern.m)) == (int, int)
    assert pattern == NM(2, 4)
    assert hash(pattern) == hash(NM(2, 4))
    assert str(pattern) == "2:4"


def test_unknown_flatten():
    with pytest.raises(ValueError, match='"channel" or "kernel", got \'filter\''):
        NM(2, 4, flatten="filter")


def test_strides_that_are_refused():
    with pytest.raises(ValueError, match=r'takes stride 1, got 16.* write "2:4/16"'):
        NM(2, 4, flatten="kernel", stride=16)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        parse_pattern("2:4/0")


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("m", [4, 8])
def test_semi_structured_is_at_most_2_of_every_4_neighbors(n, m, stride):
    # Neighbors of one group compete for n places, and each group may keep any of its members.
    group_of = [run * stride + r for run in range(4) for _ in range(m) for r in range(stride)]
    fours = [group_of[i : i + 4] for i in range(0, len(group_of) - 3, 4)]
    most = max(sum(min(n, four.count(group)) for group in set(four)) for four in fours)
    assert NM(n, m, stride=stride).is_semi_structured == (most <= 2)


def test_patterns_are_frozen_and_not_callable():
    pattern = NM(2, 4)
    assert not callable(pattern)
    with pytest.raises(AttributeError):
        pattern.n = 3


def test_patterns_can_be_copied_and_pickled():
    pattern = NM(2, 4, flatten="kernel")
    assert copy.deepcopy(pattern) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_an_equal_pattern_as_a_static_argument_does_not_compile_again():
    traces = []

    @jax.jit(static_argnums=1)
    def kept(w, pattern):
        traces.append(pattern)
        return w * pattern.density

    kept(1.0, NM(2, 4))
    kept(1.0, parse_pattern("2:4"))
    assert len(traces) == 1
    kept(1.0, NM(1, 4))
    assert len(traces) == 2


# Blocks


@st.composite
def blocks(draw):
    sparsity = draw(st.floats(0, 1, exclude_max=True, allow_subnormal=False))
    return Block1xN(draw(st.integers(1, 1024)), sparsity, draw(st.booleans()))


@given(blocks())
def test_blocks_as_text_there_and_back(pattern):
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("1x16@0.5", Block1xN(16, 0.5)),
        (" 1 x 32 @ .25 ", Block1xN(32, 0.25)),
        ("1X4@0", Block1xN(4, 0)),
        ("1x4@1e-3", Block1xN(4, 0.001)),
        ("1x4@0.5/row", Block1xN(4, 0.5)),
        ("1x4@0.5/layer", Block1xN(4, 0.5, uniform=False)),
    ],
)
def test_text_of_blocks_that_parses(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    ["1x16", "2x16@0.5", "1x@0.5", "1x4@", "1x4@50%", "1x4@0.5/filter"],
)
def test_text_of_blocks_that_does_not_parse(text):
    with pytest.raises(ValueError, match="cannot read") as error:
        parse_pattern(text)
    assert '"1x16@0.5"' in str(error.value)


@st.composite
def written(draw):
    """A sparsity as one writes it, a decimal or a fraction, and what it means."""
    scale = draw(st.sampled_from([10, 100, 1000, 10**6, 3, 7, 96, 128]))
    exact = Fraction(draw(st.integers(0, scale - 1)), scale)
    return exact.numerator / exact.denominator, exact


@given(written(), st.integers(1, 64), st.booleans(), st.integers(0, 300), st.integers(0, 20))
def test_blocks_and_weights_that_stay(sparsity, n, uniform, inputs, rows):
    number, exact = sparsity
    pattern, outputs = Block1xN(n, number, uniform), rows * n
    dropped = rows * math.floor(exact * inputs) if uniform else math.floor(exact * (rows * inputs))
    assert pattern.kept(inputs, outputs) == inputs * outputs - dropped * pattern.n
    assert pattern.misfit(inputs, outputs) is None
    assert pattern.density == 1 - pattern.sparsity


DECIMALS = ["0.29", "0.57", "0.58", "0.7", "0.9", "0.95", ".3", "1e-3"]
INPUTS = [10, 20, 50, 64, 100, 200, 300, 400, 1000]
# In floating point, 0.29 * 100 is just below 29.
BELOW = [("0.29", 100), ("0.57", 100), ("0.58", 50)]


@pytest.mark.parametrize("text", DECIMALS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_decimal_as_written_counts(text, inputs):
    dropped = math.floor(Fraction(text) * inputs)
    pattern = parse_pattern(f"1x2@{text}")
    assert pattern.kept_blocks(inputs) == inputs - dropped
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in BELOW))
        for case in itertools.product(DECIMALS, INPUTS)
    ],
)
def test_masks_drop_the_decimal_as_written(text, inputs):
    dropped = math.floor(Fraction(text) * inputs)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(inputs, 2)), jnp.float32)
    assert block_mask(w, 2, float(text)).sum() == 2 * (inputs - dropped)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_count_as_they_are_written(dtype):
    """As a float, `np.float32(0.29)` is 0.28999999165534973."""
    for text in ("0.29", "0.57", "0.7", "0.95", "0.001"):
        pattern, dropped = Block1xN(2, dtype(text)), math.floor(Fraction(text) * 1000)
        assert pattern == Block1xN(2, float(text))
        assert type(pattern.sparsity) is float
        assert pattern.kept_blocks(1000) == 1000 - dropped
    assert Block1xN(2, dtype(5 / 6)).kept_blocks(300) == 50
    assert as_fraction(dtype(0.29)) == Fraction(29, 100)
    # Written with more digits, it is no short fraction.
    assert Block1xN(2, np.float32(0.1234567)).sparsity == 0.1234567


@pytest.mark.parametrize("sparsity", [1 / 3, 2 / 3, 1 / 7, 0.1 + 0.2])
def test_other_sparsities_count_as_the_nearest_that_one_would_write(sparsity):
    """A third of 300 blocks are 100; 0.1 + 0.2 is 0.30000000000000004 in Python."""
    exact = {1 / 3: Fraction(1, 3), 2 / 3: Fraction(2, 3), 1 / 7: Fraction(1, 7)}.get(sparsity)
    exact = exact or Fraction("0.30000000000000004")
    for inputs in range(0, 2100, 7):
        dropped = math.floor(exact * inputs)
        assert Block1xN(4, sparsity).kept_blocks(inputs) == inputs - dropped


def test_what_does_not_fit():
    assert Block1xN(16, 0.5).misfit(5, 24) == "24 outputs are not a multiple of 16"
    assert NM(2, 4).misfit(6, 5) == "6 inputs are not a multiple of 4"
    assert NM(2, 4).misfit(8, 5) is None
    assert NM(2, 4, stride=8).misfit(48, 5) == "48 inputs are not a multiple of 32 = 4 * 8"
    assert NM(2, 4, stride=8).misfit(64, 5) is None


@pytest.mark.parametrize("n", [0, -1])
def test_blocks_of_no_outputs(n):
    with pytest.raises(ValueError, match=f"got n={n}"):
        Block1xN(n, 0.5)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, float("nan"), float("inf"), 50])
def test_sparsity_outside_of_0_to_1(sparsity):
    with pytest.raises(ValueError, match=f"0 <= sparsity < 1, got {sparsity}") as error:
        Block1xN(16, sparsity)
    assert ("did you mean 0.5?" in str(error.value)) == (sparsity == 50)


@pytest.mark.parametrize("bad", [True, "0.5", None, np.array([0.5, 0.5]), 0.5j])
def test_what_is_no_sparsity(bad):
    with pytest.raises(TypeError, match="sparsity must be a Python number"):
        Block1xN(16, bad)


def test_other_wrong_types_of_blocks():
    with pytest.raises(TypeError, match="n must be a Python integer"):
        Block1xN(16.0, 0.5)
    with pytest.raises(TypeError, match="uniform must be True or False"):
        Block1xN(16, 0.5, uniform=1)
    with pytest.raises(TypeError, match="inject_hyperparams pass the pattern as text"):
        jax.jit(lambda s: Block1xN(16, s).density)(0.5)


def test_numpy_numbers_become_python_ones():
    pattern = Block1xN(np.int64(16), np.float32(0.5))
    assert (type(pattern.n), type(pattern.sparsity)) == (int, float)
    assert pattern == Block1xN(16, 0.5)
    assert str(pattern) == "1x16@0.5"


def test_blocks_are_values():
    pattern = Block1xN(16, 0.5)
    assert not callable(pattern)
    assert hash(pattern) == hash(Block1xN(16, 0.5))
    assert pattern != Block1xN(16, 0.5, uniform=False)
    assert pickle.loads(pickle.dumps(copy.deepcopy(pattern))) == pattern
    assert parse_pattern(pattern) is pattern
    with pytest.raises(AttributeError):
        pattern.n = 3

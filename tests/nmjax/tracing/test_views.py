"""Views against NumPy: where do the entries of an array go when it is moved?"""

import math

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from nmjax.tracing.views import View, merged, no_axis, whole

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def entries(view):
    """The numbers of the weight's entries, laid out as the view says."""
    value = np.zeros([math.prod(p.size for p in pieces) for pieces in view.axes], int)
    strides = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
    for axis, pieces in enumerate(view.axes):
        along = np.zeros((), int)
        for piece in pieces:
            stride = 0 if piece.axis is None else piece.stride * strides[piece.axis]
            along = np.add.outer(along, np.arange(piece.size) * stride)
        shape = [1] * value.ndim
        shape[axis] = -1
        value = value + along.reshape(shape)
    return value


def factorized(size, draw):
    """A random shape with `size` entries."""
    shape = []
    while size > 1:
        factor = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape.append(factor)
        size //= factor
    return draw(st.permutations([*shape, *draw(st.lists(st.just(1), max_size=2))]))


@given(st.data())
def test_reshapes_and_transposes_lead_where_numpy_says(data):
    shape = tuple(data.draw(SIZES))
    expected = np.arange(math.prod(shape)).reshape(shape)
    view = whole("w", shape)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(expected.ndim)))
            expected, view = expected.transpose(order), view.pick(order)
        else:
            after = tuple(factorized(expected.size, data.draw))
            moved = view.reshaped(expected.shape, after)
            assume(moved is not None)  # The new axes must not cut a piece unevenly.
            expected, view = expected.reshape(after), moved
    sizes = [math.prod(p.size for p in pieces) for pieces in view.axes]
    assert all(size in (1, n) for size, n in zip(sizes, expected.shape, strict=True))
    np.testing.assert_array_equal(np.broadcast_to(entries(view), expected.shape), expected)


@given(SIZES)
def test_a_reshape_there_and_back_changes_nothing(sizes):
    shape = tuple(size + 1 for size in sizes)
    flat = (math.prod(shape),)
    view = whole("w", shape).reshaped(shape, flat)
    assert view.reshaped(flat, shape) == whole("w", shape)


def test_a_part_of_an_axis_is_not_cut():
    view = whole("w", (8, 6))
    # A slice of 4 of the 8 rows: the view still says 8.
    assert view.reshaped((4, 6), (2, 2, 6)) is None
    assert view.reshaped((4, 6), (4, 1, 6)).axes[0] == view.axes[0]


def test_merging_keeps_what_one_view_knows_and_refuses_what_contradicts():
    view = whole("w", (4, 4))
    gain = View("w", (4, 4), (no_axis(4), view.axes[1]), keeps_zeros=False)
    assert merged([gain, view]).axes == view.axes
    assert merged([view, view.pick([1, 0])]) is None


def test_a_shard_is_a_smaller_weight():
    shard = whole("w", (8, 6)).resized((4, 6))
    assert shard.shape == (4, 6)
    assert shard.reshaped((4, 6), (2, 2, 6)) is not None
    assert shard.resized((8, 6)) == whole("w", (8, 6))

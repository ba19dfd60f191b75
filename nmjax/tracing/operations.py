"""Operations that move the entries of an array or change them one by one, by primitive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nmjax.tracing.views import Piece, Shape, View, no_axis
from nmjax.tracing.walk import shape_of

if TYPE_CHECKING:
    from jax.extend import core

# f(0) = 0, at least for the ranges that programs clip to.
_KEEP_ZEROS = """
    abs asin asinh atan atanh cbrt ceil clamp convert_element_type copy copy_p device_put erf expm1
    floor imag integer_pow log1p max min mul name neg optimization_barrier real reduce_precision
    round sharding_constraint sign sin sinh sqrt square stop_gradient tan tanh
"""
# The masks of `nmjax.masks`: the members of a group compete, but each entry stays at its place.
MASKS = ("nm_keep", "nm_keep_on_shards")
# Operations on values that all devices of a mesh axis hold alike, or that only move them.
_ACROSS_DEVICES = """
    all_reduce layout_constraint mesh_cast pbroadcast pcast pmax pmin psum psum2 psum_invariant
    pvary reshard
"""
_CHANGE_ZEROS = """
    acos acosh add add_any and atan2 cos cosh digamma div eq eq_to erf_inv erfc exp exp2 ge gt
    is_finite le lgamma log logistic lt ne nextafter not or pow rem rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sub xor
"""
_RUNNING = "cumlogsumexp cummax cummin cumprod cumsum"
_REDUCTIONS = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
KEEP_ZEROS = frozenset((*(_KEEP_ZEROS + _ACROSS_DEVICES).split(), *MASKS))
ELEMENTWISE = KEEP_ZEROS | frozenset((_CHANGE_ZEROS + _RUNNING).split())
REDUCTIONS = frozenset(_REDUCTIONS.split())

# Operations that write values into an array.
UPDATES = frozenset(("dynamic_update_slice", "scatter", "scatter-add", "scatter_add"))

Move = Callable[["core.JaxprEqn", View], View | None]


def _transpose(equation: core.JaxprEqn, view: View) -> View:
    return view.pick(equation.params["permutation"])


def _reshape(equation: core.JaxprEqn, view: View) -> View | None:
    before, order = shape_of(equation.invars[0]), equation.params.get("dimensions")
    if order is not None:  # vmap of a convolution transposes and reshapes in one operation.
        before, view = tuple(before[axis] for axis in order), view.pick(order)
    return view.reshaped(before, shape_of(equation.outvars[0]))


def _squeeze(equation: core.JaxprEqn, view: View) -> View:
    return view.without(equation.params["dimensions"])


def _broadcast(equation: core.JaxprEqn, view: View) -> View:
    before, after = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    axes = [no_axis(size) for size in after]
    for axis, place in enumerate(equation.params["broadcast_dimensions"]):
        if before[axis] == after[place]:
            axes[place] = view.axes[axis]
    return view.at(axes)


def _expand(equation: core.JaxprEqn, view: View) -> View:
    axes = list(view.axes)
    for axis in sorted(equation.params["dimensions"]):
        axes.insert(axis, no_axis(1))
    return view.at(axes)


def _reduce(equation: core.JaxprEqn, view: View) -> View:
    return view.without(equation.params["axes"]).changed()


def _all_gather(equation: core.JaxprEqn, view: View) -> View | None:
    before, after = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    return view.resized(after) if len(before) == len(after) else None


def _slice(equation: core.JaxprEqn, view: View) -> View | None:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    sizes = tuple(limit - start for start, limit in zip(starts, limits, strict=True))
    cut = _cut(view, shape_of(equation.invars[0]), sizes, starts)
    for axis, step in enumerate(equation.params["strides"] or ()):
        if step > 1 and cut is not None:
            cut = cut.cut(axis, 1, f"a slice in steps of {step}")
    return cut


def _cut(view: View, before: Shape, sizes: Shape, starts: Sequence[int | None]) -> View | None:
    """The view of a slice; None if it cuts through several axes of the weight at once.

    A start is None if the program computes it.
    """
    cut = view
    for axis, (size, part, start) in enumerate(zip(before, sizes, starts, strict=True)):
        # Merged axes, such as (experts, in), cannot say which of them the slice runs along.
        if 1 < part < size and len({piece.axis for piece in view.axes[axis]}) > 1:
            return None
        if part == size:
            continue
        if start is None:
            cut = cut.cut(axis, 1, "a slice from a computed entry")
        else:
            why = f"a slice from entry {start} to {start + part}"
            cut = cut.cut(axis, math.gcd(start, part), why, start)
    return cut


def _split(equation: core.JaxprEqn, view: View) -> View:
    sizes = [int(size) for size in equation.params["sizes"]]
    return view.cut(equation.params["axis"], math.gcd(*sizes), f"a split into {sizes}")


def _pad(equation: core.JaxprEqn, view: View) -> View:
    for axis, (low, high, between) in enumerate(equation.params["padding_config"]):
        if low or high or between:
            size = shape_of(equation.invars[0])[axis]
            aligned = 1 if between else math.gcd(low, high, size)
            view = view.cut(axis, aligned, f"padding by {low} and {high}", start=-low)
    return view


def _reverse(equation: core.JaxprEqn, view: View) -> View:
    for axis in equation.params["dimensions"]:
        view = view.reversed(axis, shape_of(equation.invars[0])[axis])
    return view


def _tile(equation: core.JaxprEqn, view: View) -> View:
    return view.at(
        [
            pieces if repeats == 1 else (Piece(None, 1, repeats), *pieces)
            for pieces, repeats in zip(view.axes, equation.params["reps"], strict=True)
        ]
    )


def _bitcast(equation: core.JaxprEqn, view: View) -> View | None:
    same = shape_of(equation.invars[0]) == shape_of(equation.outvars[0])
    return view if same else None


# Primitive -> what it does to a view of its first operand. A slice keeps the pieces of an axis.
MOVES: dict[str, Move] = {
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "expand_dims": _expand,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "tile": _tile,
    "transpose": _transpose,
    **dict.fromkeys(REDUCTIONS, _reduce),
}


def moves_whole_axes(equation: core.JaxprEqn) -> bool:
    """Whether an operation neither merges, nor splits, nor drops axes."""
    before, after = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    if equation.primitive.name == "reshape":
        return [n for n in before if n != 1] == [n for n in after if n != 1]
    return equation.primitive.name not in REDUCTIONS


def side_by_side(equation: core.JaxprEqn, part: int, view: View) -> View:
    """The view of a part of a concatenation or a stack in the whole."""
    if equation.primitive.name == "concatenate":
        axis = equation.params["dimension"]
        sizes = [shape_of(operand)[axis] for operand in equation.invars[: part + 1]]
        before = sum(sizes[:-1])
        why = f"a concatenation at entry {before}"
        return view.cut(axis, math.gcd(before, sizes[-1]), why, start=-before)
    axes = list(view.axes)
    axes.insert(equation.params["axis"], no_axis(len(equation.invars)))
    return view.at(axes)


def gathered(equation: core.JaxprEqn, view: View) -> View | None:
    """The view of what a gather or a dynamic slice picks."""
    if equation.primitive.name == "dynamic_slice":
        # Literals only; a start that the program computes is not followed.
        given = [getattr(start, "val", None) for start in equation.invars[1:]]
        starts = [None if start is None else int(start) for start in given]
        return _cut(view, shape_of(equation.invars[0]), equation.params["slice_sizes"], starts)
    sizes = equation.params["slice_sizes"]
    numbers = equation.params["dimension_numbers"]
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(view.axes)) if axis not in removed]
    shape = shape_of(equation.outvars[0])
    axes = [no_axis(size) for size in shape]
    for place, axis in zip(numbers.offset_dims, kept, strict=True):
        axes[place] = view.axes[axis]
        if sizes[axis] < shape_of(equation.invars[0])[axis]:
            view = view.cut(axis, 1, "a slice from a computed entry")
    others = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    # A list of numbers along one axis reorders this axis, or takes a part of it.
    if len(others) == 1 and len(removed) == 1:
        axes[others[0]] = view.axes[removed[0]]
        view = view.cut(removed[0], 1, "a list of entries")
    return view.at(axes)


def picked_axes(equation: core.JaxprEqn) -> tuple[int, ...]:
    """The axes along which a gather or a dynamic slice picks single entries, as a look-up does."""
    shape, sizes = shape_of(equation.invars[0]), equation.params["slice_sizes"]
    return tuple(axis for axis, size in enumerate(sizes) if size == 1 < shape[axis])


def number_of_picks(equation: core.JaxprEqn) -> int:
    """How many slices a gather takes."""
    picks = 1
    if equation.primitive.name == "gather":
        for size in shape_of(equation.invars[1])[:-1]:
            picks *= size
    return picks

"""Products as layers call them, with a packed weight in place of the dense one.

The functions take the arguments of `lax.dot_general`, `lax.conv_general_dilated` and `jnp.einsum`.
They unpack the weight if its packed form has no product that does what the arguments ask for.
"""

from __future__ import annotations

import string
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.kernels.matmul import Implementation, packed_conv, packed_matmul
from nmjax.layouts.axes import Axes, Shape
from nmjax.packed.weight import Packed


def packed_dot_general(
    x: jax.Array,
    packed: Packed,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    implementation: Implementation = None,
    **settings: Any,
) -> jax.Array:
    """`lax.dot_general` with a packed weight on the right.

    Batch axes of the weight must come first. One packed product then runs for each entry.
    """
    (x_axes, w_axes), (x_batch, w_batch) = dimension_numbers
    plan, ndim = packed.leaf_plan, len(packed.shape)
    summed = {axis - ndim: x_axis for axis, x_axis in zip(w_axes, x_axes, strict=True)}
    outputs = tuple(axis for axis in range(ndim) if axis not in (*w_axes, *w_batch))
    # The plan may have packed the weight along other axes than those that the layer contracts.
    fits = (
        set(summed) == set(plan.reduction_axes)
        and tuple(axis - ndim for axis in outputs) == plan.output_axes
        and tuple(w_batch) == tuple(range(len(packed.leading)))
    )
    default = _default_precision(precision)
    if not fits or default is None or _is_asked(settings):
        settings |= {"precision": precision, "preferred_element_type": preferred_element_type}
        return lax.dot_general(x, packed.unpack(), dimension_numbers, **settings)
    # packed_matmul wants the summed axes of x last, in the order of the plan's reduction axes.
    last = [summed[axis] for axis in plan.reduction_axes]
    rows = [axis for axis in range(x.ndim) if axis not in (*x_batch, *last)]
    multiply = partial(packed_matmul, implementation=implementation)
    for _ in w_batch:
        multiply = jax.vmap(multiply)
    x, packed = _widened(x.transpose(*x_batch, *rows, *last), packed, preferred_element_type)
    with default:
        y = multiply(x, packed)
    return y.astype(preferred_element_type or y.dtype)


def packed_conv_general(
    x: jax.Array,
    packed: Packed,
    strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    feature_group_count: int = 1,
    preferred_element_type: Any = None,
    *,
    implementation: Implementation = None,
    dimension_numbers: Any = None,
    precision: Any = None,
    **settings: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` with a packed kernel."""
    plain = feature_group_count == 1 and all(d == 1 for d in lhs_dilation or ())
    fits = (
        plain
        and _sums_as_planned(packed)
        and _is_channels_last(x.shape, packed.shape, dimension_numbers)
    )
    default = _default_precision(precision)
    if not fits or default is None or _is_asked(settings):
        return lax.conv_general_dilated(
            x,
            packed.unpack(),
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **settings,
        )
    x, packed = _widened(x, packed, preferred_element_type)
    with default:
        y = packed_conv(
            x,
            packed,
            strides=strides,
            padding=padding,
            dilation=rhs_dilation or 1,
            implementation=implementation,
        )
    return y.astype(preferred_element_type or y.dtype)


def packed_einsum(
    subscripts: str,
    x: jax.Array,
    packed: Packed,
    *,
    implementation: Implementation = None,
    **settings: Any,
) -> jax.Array:
    """`jnp.einsum` of an input and a packed weight. The subscripts must have an output."""
    x_letters, w_letters, y_letters = _letters(subscripts, x.ndim)
    shared = [c for c in w_letters if c in x_letters]
    summed = [c for c in shared if c not in y_letters]
    batch = [c for c in shared if c in y_letters]
    outputs = [c for c in w_letters if c not in x_letters]
    rows = [c for c in x_letters if c not in w_letters]
    product = [*batch, *rows, *outputs]
    is_dot = all(len(set(word)) == len(word) for word in (x_letters, w_letters, y_letters))
    # The others are sums over one operand, diagonals, and kernels that broadcast. A sharding names
    # the axes of the result, which `packed_dot_general` would have in another order.
    is_dot = is_dot and set(product) == set(y_letters) and "." not in w_letters
    # jnp.einsum repeats axes of size 1, which packed products do not.
    sizes = _sizes(x_letters, x.shape, shared)
    is_dot = is_dot and sizes is not None and sizes == _sizes(w_letters, packed.shape, shared)
    if not is_dot or settings.get("out_sharding") is not None:
        return jnp.einsum(subscripts, x, packed.unpack(), **settings)

    def axes_in(word: str, letters: list[str]) -> tuple[int, ...]:
        return tuple(word.index(letter) for letter in letters)

    dimension_numbers = (
        (axes_in(x_letters, summed), axes_in(w_letters, summed)),
        (axes_in(x_letters, batch), axes_in(w_letters, batch)),
    )
    y = packed_dot_general(x, packed, dimension_numbers, implementation=implementation, **settings)
    return y.transpose([product.index(letter) for letter in y_letters])


def summed_axes(subscripts: str) -> tuple[int, ...]:
    """The axes of an einsum's second operand that it sums over, as negative numbers.

    >>> summed_axes("btd,dnh->btnh")
    (-3,)
    """
    x_letters, w_letters, y_letters = _letters(subscripts, None)
    return tuple(
        index - len(w_letters)
        for index, letter in enumerate(w_letters)
        if letter in x_letters and letter not in y_letters
    )


def _letters(subscripts: str, ndim: int | None) -> tuple[str, str, str]:
    """The letters of input, weight and output; an ellipsis of the input becomes letters."""
    operands, y = subscripts.replace(" ", "").split("->")
    x, w = operands.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in subscripts]
    count = 0 if ndim is None else ndim - len(x.replace("...", ""))
    ellipsis = "".join(spare[: max(count, 0)])
    return x.replace("...", ellipsis), w, y.replace("...", ellipsis)


def _sums_as_planned(kernel: Packed) -> bool:
    """Whether a kernel (*taps, inputs, outputs) is packed along the axes that a convolution sums.

    The plan may have packed it along its outputs, or with its taps in another order.
    """
    plan = kernel.leaf_plan
    placed = plan.pattern.place(Axes((-2,), (-1,), tuple(range(-len(kernel.shape), -2))))
    return (plan.reduction_axes, plan.output_axes, plan.tap_axes) == placed


def _is_channels_last(x_shape: Shape, w_shape: Shape, dimension_numbers: Any) -> bool:
    """Whether a convolution's axes are those of `packed_conv`; the default of `lax` has others."""
    numbers = lax.conv_dimension_numbers(x_shape, w_shape, dimension_numbers)
    last, spatial = len(w_shape) - 1, range(len(w_shape) - 2)
    image = (0, last, *(axis + 1 for axis in spatial))
    return numbers == lax.ConvDimensionNumbers(image, (last, last - 1, *spatial), image)


def _sizes(letters: str, shape: Shape, wanted: list[str]) -> list[int] | None:
    """Sizes of an operand's axes by letter; None if there is not one letter for each axis."""
    if len(letters) != len(shape):
        return None
    return [shape[letters.index(letter)] for letter in wanted]


def _is_asked(settings: dict[str, Any]) -> bool:
    """Whether there are settings, such as `out_sharding`, that packed products do not take."""
    return any(value is not None for value in settings.values())


def _default_precision(precision: Any) -> AbstractContextManager[Any] | None:
    """A context in which products without a precision of their own have this one.

    None if no default can express it, as with a precision for each operand.
    """
    if precision is None:
        return nullcontext()
    first, *others = precision if isinstance(precision, tuple) else (precision,)
    if any(other != first for other in others):
        return None
    if isinstance(first, lax.DotAlgorithmPreset):
        return jax.default_matmul_precision(first.name)
    try:
        return jax.default_matmul_precision(lax.Precision(first).name.lower())
    except ValueError:
        return None


def _widened(x: jax.Array, packed: Packed, dtype: Any) -> tuple[jax.Array, Packed]:
    """The operands in a dtype that the result must have, if that dtype is wider."""
    # XLA sums in the wider dtype. A cast of the result alone would keep the rounding.
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return x, packed
    if jnp.finfo(dtype).bits <= jnp.finfo(packed.result_dtype(x)).bits:
        return x, packed
    return x.astype(dtype), packed.astype(dtype)

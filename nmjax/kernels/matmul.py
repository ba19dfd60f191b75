"""Products with packed weights: a table of implementations, and the choice of one.

Each implementation is one row of `IMPLEMENTATIONS`. To add one, add a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import lax

from nmjax.kernels import reference
from nmjax.kernels.arguments import check_floating, check_product, flat_bias
from nmjax.kernels.cpu import compiled, gathered
from nmjax.kernels.cpu.speedups import measured_speedup
from nmjax.kernels.derivatives import differentiable
from nmjax.kernels.gpu import cusparselt, decode
from nmjax.kernels.gpu.devices import check_gpu
from nmjax.kernels.operands import Activation, Padding, as_window
from nmjax.kernels.tpu import decode as tpu
from nmjax.kernels.tpu.devices import check_tpu
from nmjax.kernels.tpu.placement import explicit_axes
from nmjax.masks.scores import as_array
from nmjax.packed.tiled import TiledNM
from nmjax.packed.weight import Packed

Implementation = Literal["ffi", "gather", "row_by_row", "xla", "decode", "cusparselt", "tpu"] | None


class Row(NamedTuple):
    """A way to multiply by packed weights.

    Attributes:
      matmul: (x, packed, bias=, activation=) -> y.
      conv: the same with `window=`; None if it multiplies matrices only.
      check: (dtype of x, packed, rows) -> None. Raises NotImplementedError saying why this
        implementation cannot take the operands.
      check_pays: (packed, rows) -> the reason why this is faster than unpacking. Raises
        NotImplementedError if it is not. None: taken only when asked for by name.
    """

    matmul: Callable[..., jax.Array]
    conv: Callable[..., jax.Array] | None
    check: Callable[[np.dtype, Packed, int], None]
    check_pays: Callable[[Packed, int], str] | None = None


class Choice(NamedTuple):
    """An implementation and the reason for it.

    Attributes:
      name: a row of `IMPLEMENTATIONS`.
      reason: in words.
      only_on: the only platform that runs it; others unpack instead, decided when the program is
        compiled. None: every platform.
    """

    name: str
    reason: str
    only_on: str | None = None


def _checked(
    check: Callable[[np.dtype, Packed, int], None], check_device: Callable[[], None]
) -> Callable[[np.dtype, Packed, int], None]:
    """Adds a check of the device; the kernels' own calls may be traced for another."""

    def check_here(dtype: np.dtype, packed: Packed, rows: int) -> None:
        check(dtype, packed, rows)
        check_device()

    return check_here


# In the order in which they are tried.
IMPLEMENTATIONS: dict[str, Row] = {
    "ffi": Row(compiled.matmul, compiled.conv, compiled.check, compiled.check_pays),
    "gather": Row(gathered.gather_matmul, None, gathered.check, gathered.check_gather_pays),
    "row_by_row": Row(
        gathered.row_by_row_matmul, None, gathered.check, gathered.check_row_by_row_pays
    ),
    "xla": Row(reference.matmul, reference.conv, lambda dtype, packed, rows: None),
    "decode": Row(decode.matmul, None, _checked(decode.check, check_gpu)),
    "cusparselt": Row(cusparselt.packed_matmul, None, _checked(cusparselt.check, check_gpu)),
    "tpu": Row(tpu.matmul, None, _checked(tpu.check, check_tpu)),
}


def choose(dtype: np.dtype, packed: Packed, rows: int) -> Choice:
    """The implementation that measured fastest on CPUs; for TPUs, if the weight is laid out so.

    Args:
      dtype: of the input.
      packed: one weight, not a stack.
      rows: of x, or output pixels of all images.
    """
    if isinstance(packed, TiledNM):
        try:
            tpu.check(dtype, packed, rows)
        except NotImplementedError as reason:
            return Choice("xla", str(reason))
        return Choice("tpu", "laid out for TPUs", only_on="tpu")
    # The first row that can and pays wins. If none does, the best row's obstacle is the reason.
    reasons = []
    for name, row in IMPLEMENTATIONS.items():
        if row.check_pays is None:
            continue
        try:
            row.check(dtype, packed, rows)
            pays = row.check_pays(packed, rows)
        except NotImplementedError as reason:
            reasons.append(str(reason))
        else:
            return Choice(name, "; ".join([*reasons[:1], pays]), only_on="cpu")
    return Choice("xla", reasons[0])


def expected_speedup(dtype: np.dtype, packed: Packed) -> float | None:
    """How much faster than the dense product to expect on a CPU with AVX-512 and many rows.

    Returns:
      A ratio, interpolated between measurements; 1.0 where the dense product is taken; None where
      nothing was measured.
    """
    # The table was measured with 256 rows; the choice depends on the number of rows.
    name = choose(dtype, packed, 256).name
    if name == "xla":
        return 1.0
    if name != "ffi":
        return None
    return measured_speedup(compiled.work(packed), dtype, packed)


def packed_matmul(
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None = None,
    *,
    activation: Activation = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Multiplies `x` by a packed weight, without unpacking it where that is faster.

    Differentiable in `x`, the packed values and `bias` in reverse mode, so kept weights can be
    fine-tuned packed. Under `jax.vmap` over `x`, the new axis joins the batch. Inside
    `jax.shard_map`, the arrays of `packed` may be a shard of its outputs; the result is then that
    shard's. Under `jax.jit` on a mesh with automatic axes, a sharded batch of `x` and sharded
    outputs (the last axis of an N:M weight's arrays, the first of a 1xN weight's) stay sharded
    without communication. Operands sharded over explicit axes take the unpacked product, unless the
    weight is laid out for TPUs and only rows of `x` and outputs are sharded.

    On one CPU device, an infinity or NaN in `x` never meets a dropped weight. With several devices,
    or on other platforms, plain XLA inside `jax.jit` multiplies it by the zero of the dropped
    weight, and the output is NaN.

    Args:
      x: (..., *reduction axes of the weight), floating.
      packed: one leaf of what `nmjax.pack` returns; for a stack of layers, pass one layer, or use
        `jax.vmap` or `jax.lax.scan`.
      bias: of the shape of the weight's output axes.
      activation: None or `"relu"`, applied after the bias.
      implementation: a row of `IMPLEMENTATIONS`, or None for the one that measured fastest for
        the platform and the shape. `"xla"` unpacks. `"ffi"` is the compiled kernels for CPUs.
        `"gather"` and `"row_by_row"` are plain XLA for uniform blocks. For 2:4 on NVIDIA GPUs,
        `"decode"` is for few rows and `"cusparselt"` for many; it compresses the weight in each
        call (`nmjax.kernels.gpu.cusparselt.prepare` does it once). None never chooses these two,
        because they have not been measured yet. See `nmjax.backends`.

    Returns:
      (..., *output axes of the weight), of the dtype that `x` and the values promote to; sums are
      kept in float32 or wider.

    Raises:
      TypeError: `packed` is not a packed weight, or `x` is not floating.
      ValueError: shapes do not fit; an unknown activation or implementation.
      NotImplementedError: the implementation asked for cannot take these operands.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> packed = nmjax.pack(nmjax.prune(params, plan), plan)
    >>> packed_matmul(jnp.ones((1, 4)), packed["kernel"]).tolist()
    [[7.0, 15.0]]
    """
    check_product(packed, activation)
    _check_name(implementation)
    inputs = packed.reduction_shape
    x = as_array(x, "inputs")
    check_floating(x)
    if packed.taps or packed.stack:
        raise ValueError(
            f"a weight of shape {packed.shape} is not one matrix: use nmjax.packed_conv for a "
            "convolution, and jax.vmap or jax.lax.scan for a stack of layers"
        )
    if x.shape[x.ndim - len(inputs) :] != inputs:
        raise ValueError(
            f"x has shape {x.shape}; its last axes should be {inputs}, the reduction axes of the "
            f"weight {packed.shape}"
        )
    # Every implementation sees one matrix of rows, whatever axes the layer has.
    batch = x.shape[: x.ndim - len(inputs)]
    rows = x.reshape(math.prod(batch), math.prod(inputs))
    way = _select(rows, packed, rows.shape[0], implementation)
    y = differentiable(
        partial(_on_platform, way, "matmul", activation=activation),
        None,
        activation,
        rows,
        packed,
        flat_bias(bias, packed),
    )
    return y.reshape(*batch, *packed.output_shape)


# `x @ packed`, of a floor below.
Packed.product = staticmethod(packed_matmul)


def packed_conv(
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    activation: Activation = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Convolves channels-last images with a packed kernel. Otherwise like `packed_matmul`.

    Args:
      x: (..., *spatial, inputs), as many spatial axes as the kernel has taps' axes.
      packed: a packed convolution kernel, of any layout.
      bias: (outputs,).
      strides: output steps, one number for all axes or one for each.
      padding: `"SAME"`, `"VALID"`, or zeros around the image: a number for all sides, or for each
        axis a number or a pair (before, after).
      dilation: distance of the kernel's taps, one number or one for each axis.
      activation: None or `"relu"`, applied after the bias.
      implementation: as in `packed_matmul`.

    Returns:
      (..., *spatial, outputs).

    Raises:
      TypeError, ValueError, NotImplementedError: as in `packed_matmul`.
    """
    check_product(packed, activation)
    _check_name(implementation)
    x = as_array(x, "inputs")
    check_floating(x)
    taps = packed.kernel_taps
    if not taps:
        raise ValueError(f"a weight of shape {packed.shape} has no taps: use nmjax.packed_matmul")
    if packed.stack:
        raise ValueError(
            f"a weight of shape {packed.shape} is not one kernel: use jax.vmap or jax.lax.scan for "
            "a stack of layers"
        )
    inputs = packed.reduction_shape[0]
    if x.ndim <= len(taps) or x.shape[-1] != inputs:
        raise ValueError(
            f"x has shape {x.shape}; expected (..., {len(taps)} spatial axes, {inputs} channels) "
            f"for the kernel {packed.shape}"
        )
    batch, spatial = x.shape[: -1 - len(taps)], x.shape[-1 - len(taps) : -1]
    window = as_window(spatial, taps, strides, padding, dilation)
    images = x.reshape(math.prod(batch), *spatial, inputs)
    pixels = images.shape[0] * math.prod(window.output(spatial, taps))
    way = _select(images, packed, pixels, implementation)
    if window.has_wide_gaps(spatial, taps) and way.name != "xla":
        if implementation is not None:
            raise NotImplementedError(
                f'implementation="{implementation}" cannot convolve with dilation {dilation}: the '
                f"kernel reaches far beyond the image {spatial}"
            )
        way = Choice("xla", "the dilated kernel reaches far beyond the image")
    if IMPLEMENTATIONS[way.name].conv is None:
        raise NotImplementedError(f'implementation="{way.name}" multiplies matrices only')
    y = differentiable(
        partial(_on_platform, way, "conv", activation=activation, window=window),
        window,
        activation,
        images,
        packed,
        flat_bias(bias, packed),
    )
    return y.reshape(*batch, *y.shape[1:])


def _select(x: jax.Array, packed: Packed, rows: int, implementation: Implementation) -> Choice:
    """What runs: the implementation asked for, or the fastest.

    Raises:
      NotImplementedError: the one asked for cannot take these operands.
    """
    # The compiler cannot split a custom call over explicit axes.
    cut = any(any(jax.typeof(operand).sharding.spec) for operand in jax.tree.leaves((x, packed)))
    if cut and isinstance(packed, TiledNM):
        cut = explicit_axes(x, packed) is None
    if implementation is None:
        if cut:
            return Choice("xla", "sharded over explicit axes of a mesh")
        return choose(x.dtype, packed, rows)
    try:
        if cut and implementation != "xla":
            raise NotImplementedError(
                "an operand is sharded over explicit axes of a mesh; use jax.shard_map"
            )
        IMPLEMENTATIONS[implementation].check(x.dtype, packed, rows)
    except NotImplementedError as reason:
        raise NotImplementedError(
            f'implementation="{implementation}" cannot multiply {packed.shape}: {reason}'
        ) from None
    return Choice(implementation, "asked for")


def _on_platform(
    way: Choice, kind: str, x: jax.Array, packed: Packed, bias: Any, **settings: Any
) -> jax.Array:
    """Runs an implementation; where it was chosen for one platform, others unpack."""

    def run(name: str, x: jax.Array, packed: Packed, bias: Any) -> jax.Array:
        product: jax.Array = getattr(IMPLEMENTATIONS[name], kind)(x, packed, bias=bias, **settings)
        return product

    # A program may be traced on one platform and compiled for another, so the platform is looked at
    # when it is compiled. What the user asked for by name runs, or fails, wherever it is.
    if way.only_on is None:
        return run(way.name, x, packed, bias)
    if way.only_on == "tpu":
        # How many devices the program is for counts too, and it chooses by both.
        y: jax.Array = tpu.matmul(x, packed, bias, **settings, may_unpack=True)
        return y
    branches = {way.only_on: partial(run, way.name)}
    return lax.platform_dependent(x, packed, bias, **branches, default=partial(run, "xla"))


def _check_name(implementation: Any) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got "
            f"{implementation!r}"
        )

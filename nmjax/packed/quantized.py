"""Packed weights with int8 values and one scale for each output.

At 2:4 they take 2.5 bytes for 4 weights; packed bfloat16 takes 4.5 and dense bfloat16 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.layouts.axes import Shape
from nmjax.packed.bits import check_dtype
from nmjax.packed.rounding import LARGEST, round_by, round_rows
from nmjax.packed.weight import Packed
from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.spans import Span, merge, split

Inputs = Literal["float", "dynamic", "static"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "input_steps"],
    meta_fields=["weight_dtype", "inputs_are"],
)
@dataclass(frozen=True, eq=False)
class Quantized(Packed, pattern=None):
    """A packed weight with integer values, `packed * scales`; a pytree node.

    `nmjax.quantize` makes it. Wherever a packed weight can be, this can be too: in products,
    modules, files, sizes and transformations.

    Attributes:
      packed: as `nmjax.pack` makes it, with values of int8 from -127 to 127.
      scales: float32 (*stack, outputs), finite and above zero.
      weight_dtype: of the weight that this stands for; static.
      inputs_are: what products multiply by: `"float"`, the inputs as they are; `"dynamic"`, each
        row of inputs rounded to int8 by its largest magnitude; `"static"`, inputs rounded to
        multiples of `input_steps`, up to 127 of them; static.
      input_steps: float32 (*stack,), finite and above zero; None unless `inputs_are` is `"static"`.
    """

    packed: Packed
    scales: jax.Array
    weight_dtype: np.dtype
    inputs_are: Inputs = "float"
    input_steps: jax.Array | None = None

    @classmethod
    def pack(cls, w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> Self:
        """Packs the weights that a mask keeps, then rounds them. There is no gradient."""
        return cls.of(Packed.kind_for(leaf_plan.pattern).pack(w, mask, leaf_plan))

    @classmethod
    def of(cls, packed: Packed) -> Self:
        """Rounds the values of each output to 255 steps, symmetric around zero.

        The largest of an output is exact. NaN and infinities stay visible: the scale of that output
        is NaN or infinite, and so is every product.
        """
        spans = packed.leaf_plan.reduction_axes, packed.leaf_plan.output_axes
        floats = packed.with_values(packed.values.astype(jnp.float32))
        dense = merge(jnp.abs(floats.unpack()), spans)
        # One scale serves all taps, whose products are summed.
        taps = len(packed.leaf_plan.tap_axes)
        largest = dense.max(axis=tuple(range(-2 - taps, -1)))
        # An output of zeros keeps scale 1, since 0 / 0 would be NaN.
        scales = jnp.where(largest == 0, 1, largest / LARGEST)
        narrow = packed.dtype.itemsize == 1  # float8, which would round the integers once more.
        made = cls(floats, scales, np.dtype(np.float32) if narrow else packed.dtype)
        steps = jnp.round(floats.values / made._value_scales())
        # Any nonzero integer keeps what is not finite so.
        steps = jnp.where(jnp.isfinite(steps), steps, 1).astype(jnp.int8)
        return replace(made, packed=packed.with_values(steps))

    def unpack(self) -> jax.Array:
        """The weight, with zeros where nothing was kept. Its gradient reaches the scales."""
        self.check_arrays()
        return (self._integers(jnp.float32).unpack() * self._dense_scales()).astype(self.dtype)

    @classmethod
    def misfits(cls, kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
        """How many groups or blocks break the pattern, and how many there are."""
        return Packed.kind_for(leaf_plan.pattern).misfits(kept, leaf_plan)

    def check(self) -> None:
        """Raises ValueError unless the arrays, of NumPy, are what `nmjax.quantize` makes."""
        self.packed.check()
        try:
            self.check_arrays()
        except TypeError as error:  # The dtypes of a file are part of what it says.
            raise ValueError(str(error)) from error
        for steps in (self.scales, self.input_steps):
            if steps is not None and not (np.isfinite(steps) & (steps > 0)).all():
                raise ValueError("scales should be finite and above zero")
        if self.inputs_are not in get_args(Inputs):
            raise ValueError(f"inputs cannot be {self.inputs_are!r}")
        if (self.values < -LARGEST).any():
            raise ValueError(f"values should be from {-LARGEST} to {LARGEST}")

    def check_arrays(self) -> None:
        """Checks the dtypes and shapes of the arrays against the plan.

        Raises:
          TypeError: values other than int8, or scales other than float32.
          ValueError: a shape that the plan does not allow.
        """
        self.packed.check_arrays()
        if self.values.dtype != np.int8:
            raise TypeError(
                f"the values of {self} are {self.values.dtype}, expected int8; nmjax.quantize "
                "makes them"
            )
        self.check_array("scales", np.dtype(np.float32), (*self._scaled, self.outputs))
        if self.inputs_are == "static":
            self.check_array("input_steps", np.dtype(np.float32), self._scaled)
        elif self.input_steps is not None:
            raise ValueError(f"{self} has input steps, although its inputs are {self.inputs_are}")

    @property
    def values(self) -> jax.Array:  # type: ignore[override]
        """The integers, int8."""
        return self.packed.values

    @property
    def leaf_plan(self) -> LeafPlan:  # type: ignore[override]
        """Pattern, axes and shape of the weight."""
        return self.packed.leaf_plan

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight that the integers and scales stand for."""
        return self.weight_dtype

    @property
    def least_nbytes(self) -> int:
        """Bytes for the integers, the scales, and an ideal code of the positions."""
        return self.packed.least_nbytes + self.scales.size * self.scales.dtype.itemsize

    @property
    def leading(self) -> Shape:
        """Sizes of the weight's axes that the pattern does not use."""
        return self.packed.leading

    @property
    def spans(self) -> tuple[Span, ...]:
        """The axes of the weight that the pattern uses."""
        return self.packed.spans

    @property
    def inputs(self) -> int:
        """Number of inputs, at one tap of a convolution, that the arrays hold."""
        return self.packed.inputs

    @property
    def outputs(self) -> int:
        """Number of outputs that the arrays hold."""
        return self.packed.outputs

    @property
    def taps(self) -> Shape:
        """Sizes of the axes of a convolution's taps."""
        return self.packed.taps

    @property
    def kernel_taps(self) -> Shape:
        """Sizes of a convolution kernel's spatial axes."""
        return self.packed.kernel_taps

    @property
    def stack(self) -> Shape:
        """Sizes of the axes in front of one weight."""
        return self.packed.stack

    def portable(self) -> Self:
        """The same weight in the layout that files store."""
        return replace(self, packed=self.packed.portable())

    def stored_arrays(self) -> dict[str, Any]:
        """The arrays by name, as files store them."""
        steps = {} if self.input_steps is None else {"input_steps": self.input_steps}
        return {**self.packed.stored_arrays(), "scales": self.scales, **steps}

    def first_layer(self) -> Self:
        """The first weight of a stack; the weight itself if it is not a stack."""
        layer = self
        for _ in self.scales.shape[:-1]:
            layer = jax.tree.map(lambda array: array[0], layer)
        return layer

    def with_plan(self, leaf_plan: LeafPlan) -> Self:
        """The same arrays under another plan."""
        return replace(self, packed=self.packed.with_plan(leaf_plan))

    def with_values(self, values: jax.Array) -> Self:
        """The same weight with other integers in the same places."""
        return replace(self, packed=self.packed.with_values(values))

    def astype(self, dtype: Any) -> Self:
        """The same integers and scales, which stand for a weight of another dtype."""
        self.check_arrays()
        dtype = jnp.dtype(dtype)
        check_dtype(dtype, f"the weight {self}")
        return replace(self, weight_dtype=dtype)

    def result_dtype(self, x: jax.Array) -> np.dtype:
        """Dtype of a product with `x`: that of `x`, since integers with scales are storage."""
        return x.dtype

    def saturated(self, x: jax.Array) -> jax.Array:
        """How many inputs are beyond the range of static steps, and become its end; int32.

        Args:
          x: inputs of a product with this weight, not with a stack.
        """
        if self.input_steps is None:
            return jnp.zeros((), jnp.int32)
        reach = (LARGEST + 0.5) * self.input_steps
        return jnp.sum(jnp.abs(x.astype(jnp.float32)) > reach, dtype=jnp.int32)

    @property
    def rounds_inputs(self) -> bool:
        """Whether products round their inputs to int8."""
        return self.inputs_are != "float"

    def rounded_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Inputs (batch, ...) of a product as integers, and their steps; None if they stay."""
        if self.inputs_are == "float":
            return None
        return round_rows(x) if self.input_steps is None else round_by(x, self.input_steps)

    @property
    def has_one_scale(self) -> bool:
        """Whether there is one scale for each output, and not one for each layer or tap too."""
        return self.scales.ndim == 1

    def stored(self, dtype: np.dtype) -> Packed:
        """The integers without their scales; every dtype of at least 16 bits holds them exactly."""
        integers = self._integers(dtype)
        if self.has_one_scale:
            return integers
        # One scale for each tap, or each layer of a stack, cannot wait for the sums.
        values = self._integers(jnp.float32).values * self._value_scales()
        return integers.with_values(values.astype(dtype))

    def scaled(self, sums: jax.Array) -> jax.Array:
        """Sums (..., outputs) of products with `stored`, times the scales that it lacks."""
        if not self.has_one_scale:
            return sums
        return sums * jnp.broadcast_to(self.scales.astype(sums.dtype), sums.shape)

    def dense_matrices(self) -> jax.Array:
        """The weight with its zeros, (*taps, inputs, outputs)."""
        w = self.stored(np.dtype(np.float32)).dense_matrices()
        return self.scaled(w).astype(self.weight_dtype)

    @property
    def _scaled(self) -> Shape:
        """Sizes of the axes in front of the outputs, along which there are scales."""
        # Leading axes that the plan does not know may be a stack of layers.
        return self.stack if self.leaf_plan.tap_axes else self.leading

    def _integers(self, dtype: Any) -> Packed:
        return self.packed.with_values(self.values.astype(dtype))

    def _value_scales(self) -> jax.Array:
        """The scale of each value."""
        floats = self._integers(jnp.float32)
        # The transpose of unpacking moves what lies at the places of the values to the values.
        _, pull = jax.vjp(lambda values: floats.with_values(values).unpack(), floats.values)
        scales: jax.Array = pull(self._dense_scales())[0]
        return scales

    def _dense_scales(self) -> jax.Array:
        """The scale of each weight, of the weight's shape."""
        plan, shape = self.leaf_plan, self.shape
        leading, outputs = self.scales.shape[:-1], self.scales.shape[-1]
        taps = [plan.shape[axis] for axis in sorted(plan.tap_axes)]
        full = (*leading, *taps, plan.inputs, outputs)
        spread = self.scales.reshape(*leading, *[1] * len(taps), 1, outputs)
        return split(jnp.broadcast_to(spread, full), shape, (plan.reduction_axes, plan.output_axes))

"""Unchanged Flax modules on packed parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jax import lax

from nmjax.kernels.cpu.depthwise import depthwise_conv
from nmjax.kernels.matmul import Implementation, packed_conv, packed_matmul
from nmjax.kernels.operands import as_window
from nmjax.packed.weight import Packed, is_packed

# Layers whose product can be replaced. Attention is made of DenseGeneral layers.
_DENSE = (nn.Dense, nn.DenseGeneral)
_LAYERS = (*_DENSE, nn.Conv)


def packed_apply(module: nn.Module, *, implementation: Implementation = None) -> Callable[..., Any]:
    """Returns a function like `module.apply` that takes packed parameters.

    `Dense`, `DenseGeneral` (and so attention) and `Conv` multiply by their packed kernels. Flax
    still handles everything else in these layers, such as biases, padding and dtypes. Layers
    without a packed kernel run as before, except that depthwise convolutions are faster on CPUs.

    Use it under `jax.jit`. Each layer unpacks its kernel, but only for its shape and dtype. The
    compiler removes that work; outside `jax.jit` it costs time.

    To export a program that contains compiled kernels, pass `jax.export.export` the argument
    `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]` for the names
    `"nmjax_blocks"` and `"nmjax_groups"`. The process that loads the export must first call
    `nmjax.backends()`, which registers the kernels.

    Args:
      module: any linen module.
      implementation: as in `nmjax.packed_matmul`.

    Returns:
      `apply(variables, *args, **kwargs)`, where `variables["params"]` comes from `nmjax.pack` or
      `nmjax.load_packed`. The rest is as in `module.apply`.

    Raises:
      TypeError: `module` is not a linen module. The returned function raises TypeError if a module
        of another class reads a packed leaf.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> model = nn.Dense(16)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> variables = {"params": nmjax.pack(nmjax.prune(params, plan), plan)}
    >>> jax.jit(packed_apply(model))(variables, jnp.ones((1, 8))).shape
    (1, 16)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a linen module instance such as nn.Dense(4), got {module!r}")

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(partial(_multiply_packed, implementation)):
            return module.apply(variables, *args, **kwargs)

    return apply


def _multiply_packed(
    implementation: Implementation,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Runs a method of a module. Flax's `__call__` of a packed layer runs on a copy of the layer.

    The copy has its own product function and reads an unpacked kernel, so Flax's code stays as is.
    """
    layer = context.module
    own = _own_params(layer)
    packed = {name: leaf for name, leaf in own.items() if is_packed(leaf)}
    if not packed and not (_is_grouped(layer) and "kernel" in own):
        return run(*args, **kwargs)
    # A subclass of one of these layers runs its own code, and then the layer's.
    base = next((base for base in _LAYERS if isinstance(layer, base)), None)
    if base is None or packed.keys() - {"kernel"}:
        raise TypeError(
            f"{type(layer).__name__} at {'/'.join(layer.path) or 'the root'} has packed leaves "
            f"{sorted(packed)}, but only the kernels of nn.Dense, nn.DenseGeneral and nn.Conv can "
            "be packed. Leave these leaves out of the plan (exclude=), or unpack them"
        )
    call = inspect.unwrap(base.__call__)
    if getattr(context.orig_method, "func", None) is not call:
        # A subclass's method. It reaches Flax's own `__call__` through super(), or later.
        return run(*args, **kwargs)
    kernel = own["kernel"]
    product: dict[str, Any] = (
        {"conv_general_dilated": _grouped_conv}
        if not packed
        else {"dot_general": partial(_dot_general, kernel, implementation)}
        if isinstance(layer, _DENSE)
        else {"conv_general_dilated": partial(_conv, kernel, implementation)}
    )
    copy = layer.clone(parent=None, **product)
    # Flax checks the kernel's shape and dtype, so the copy gets it unpacked. No product reads it.
    params = {**own, "kernel": kernel.unpack() if packed else kernel}
    return copy.apply({"params": params}, *args, method=base.__call__, **kwargs)


def _is_grouped(layer: nn.Module) -> bool:
    """Whether it is a convolution with groups and without a product function of its own."""
    return (
        isinstance(layer, nn.Conv)
        and layer.feature_group_count > 1
        and layer.conv_general_dilated is None
    )


def _own_params(module: nn.Module) -> dict[str, Any]:
    """The module's own leaves, unboxed."""
    if module.scope is None:
        return {}
    variables = module.scope.variables().get("params", {})
    leaves = {name: _unboxed(leaf) for name, leaf in variables.items()}
    # Mappings are the parameters of submodules.
    return {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Mapping)}


def _unboxed(leaf: Any) -> Any:
    """Takes a leaf out of its box."""
    # `meta.unbox` would apply the sharding of `nn.Partitioned`, which fits only the dense shape.
    if isinstance(leaf, meta.Partitioned) and is_packed(leaf.value):
        return leaf.value
    return meta.unbox(leaf)


def _dot_general(
    packed: Packed,
    implementation: Implementation,
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **settings: Any,
) -> jax.Array:
    """`lax.dot_general` with the packed weight instead of `w`, which has its shape and dtype."""
    (x_axes, w_axes), (x_batch, _) = dimension_numbers
    plan = packed.leaf_plan
    summed = {axis - w.ndim: x_axis for axis, x_axis in zip(w_axes, x_axes, strict=True)}
    outputs = tuple(axis for axis in range(-w.ndim, 0) if axis not in summed)
    # The plan may have packed the kernel along other axes than those that Flax contracts here.
    # Then `w`, the unpacked kernel, gives the right product.
    if x_batch or set(summed) != set(plan.reduction_axes) or outputs != plan.output_axes:
        return lax.dot_general(
            x, w, dimension_numbers, precision, preferred_element_type, **settings
        )
    # packed_matmul wants the summed axes of x last, in the order of the plan's reduction axes.
    last = [summed[axis] for axis in plan.reduction_axes]
    x = x.transpose(*(axis for axis in range(x.ndim) if axis not in last), *last)
    # Flax casts kernel and input to its compute dtype before the product; only `w` got the cast.
    y = packed_matmul(x, _cast(packed, w), implementation=implementation)
    return y.astype(preferred_element_type or y.dtype)


def _conv(
    packed: Packed,
    implementation: Implementation,
    x: jax.Array,
    w: jax.Array,
    strides: Any,
    padding: Any,
    *,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    feature_group_count: int = 1,
    preferred_element_type: Any = None,
    **settings: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, channels last, with the packed weight instead of `w`."""
    plain = feature_group_count == 1 and all(d == 1 for d in lhs_dilation or ())
    if not plain or len(packed.kernel_taps) != w.ndim - 2:
        settings |= {
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "feature_group_count": feature_group_count,
            "preferred_element_type": preferred_element_type,
        }
        return lax.conv_general_dilated(x, w, strides, padding, **settings)
    y = packed_conv(
        x,
        _cast(packed, w),
        strides=strides,
        padding=padding,
        dilation=rhs_dilation or 1,
        implementation=implementation,
    )
    return y.astype(preferred_element_type or y.dtype)


def _grouped_conv(
    x: jax.Array,
    w: jax.Array,
    strides: Any,
    padding: Any,
    **settings: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, channels last; faster on CPUs if it is depthwise."""

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, strides, padding, **settings)

    if w.shape[-2:] != (1, x.shape[-1]) or any(d != 1 for d in settings.get("lhs_dilation") or ()):
        return convolve(x, w)
    dilation = settings.get("rhs_dilation") or 1
    window = as_window(x.shape[1:-1], w.shape[:-2], strides, padding, dilation)
    dtype = jax.eval_shape(convolve, x, w).dtype

    # XLA's CPU backend is slow at depthwise convolutions; other platforms keep Flax's.
    def shifted(x: jax.Array, w: jax.Array) -> jax.Array:
        return depthwise_conv(x, w, window).astype(dtype)

    return lax.platform_dependent(x, w, cpu=shifted, default=convolve)


def _cast(packed: Packed, w: jax.Array) -> Packed:
    """The packed weight in the dtype that Flax computes in."""
    return packed.with_values(packed.values.astype(w.dtype))

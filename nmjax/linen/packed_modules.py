"""Unchanged Flax modules on packed parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
from jax import lax

from nmjax.kernels.cpu.depthwise import depthwise_conv
from nmjax.kernels.layer_products import packed_conv_general, packed_dot_general
from nmjax.kernels.matmul import Implementation
from nmjax.kernels.operands import as_window
from nmjax.linen.forward_pass import check_module, check_variables
from nmjax.linen.obstacles import (
    check_layer,
    check_stacks,
    check_unchanged,
    has_own_product,
    is_shared,
    no_product,
    own_params,
    reads_kernel,
)
from nmjax.packed.weight import Packed, is_packed

# Layers whose product can be replaced. Attention is made of DenseGeneral layers.
_DENSE = (nn.Dense, nn.DenseGeneral)
_LAYERS = (*_DENSE, nn.Conv)


def packed_apply(module: nn.Module, *, implementation: Implementation = None) -> Callable[..., Any]:
    """Returns a function like `module.apply` that takes packed parameters.

    `Dense`, `DenseGeneral` (and so attention) and `Conv` multiply by their packed kernels. Flax
    still handles everything else in these layers, such as biases, padding and dtypes. Layers
    without a packed kernel run as before, except that depthwise convolutions are faster on CPUs.

    A layer with its own `dot_general`, `conv_general_dilated`, `promote_dtype` or `mask` keeps it:
    it multiplies by the unpacked kernel, which is as slow as a dense layer.

    Use it under `jax.jit`. Each layer unpacks its kernel, but only for its shape and dtype. The
    compiler removes that work; outside `jax.jit` it costs time.

    To export a program that contains compiled kernels, pass `jax.export.export` the argument
    `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]` for the names
    `"nmjax_blocks"`, `"nmjax_blocks_int8"`, `"nmjax_integers"` and `"nmjax_groups"`. The process
    that loads the export must first call `nmjax.backends()`, which registers the kernels.

    Args:
      module: any linen module.
      implementation: as in `nmjax.packed_matmul`.

    Returns:
      `apply(variables, *args, **kwargs)`, where `variables["params"]` comes from `nmjax.pack` or
      `nmjax.load_packed`. The rest is as in `module.apply`.

    Raises:
      TypeError: `module` is not a linen module. The returned function raises TypeError if a module
        of another class reads a packed leaf, if a layer makes its product from a class
        (`dot_general_cls`), or if something changes the weights first: `nn.WeightNorm`,
        `nn.SpectralNorm`, `nn.map_variables` or qwix.
      ValueError: from the returned function: a packed leaf holds layers along an axis that is not
        in front.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> model = nn.Dense(16)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> variables = {"params": nmjax.pack(nmjax.prune(params, plan), plan)}
    >>> jax.jit(packed_apply(model))(variables, jnp.ones((1, 8))).shape
    (1, 16)
    """
    check_module(module, "nmjax.linen.packed_apply(module)")

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        check_variables(variables)
        check_stacks(variables)
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
    if context.method_name == "setup":  # It may share the scope of a layer only later.
        return run(*args, **kwargs)
    check_unchanged(layer)
    own = own_params(layer)
    packed = {name: leaf for name, leaf in own.items() if is_packed(leaf)}
    if not packed and not (_is_grouped(layer) and "kernel" in own):
        return run(*args, **kwargs)
    # A subclass of one of these layers runs its own code, and then the layer's.
    base = next((base for base in _LAYERS if isinstance(layer, base)), None)
    if base is None and packed.keys() == {"kernel"} and is_shared(layer, _LAYERS):
        return run(*args, **kwargs)
    if base is None or packed.keys() - {"kernel"}:
        raise no_product(layer, sorted(packed))
    call = inspect.unwrap(base.__call__)
    if getattr(context.orig_method, "func", None) is not call:
        # A subclass's method. It reaches Flax's own `__call__` through super(), or later.
        try:
            return run(*args, **kwargs)
        except flax.errors.ScopeParamShapeError as error:
            raise reads_kernel(layer, error) from error
    kernel = own["kernel"]
    if packed:
        check_layer(layer, kernel)
    copy = layer.clone(parent=None, **_product(layer, base, kernel, implementation))
    # Flax checks the kernel's shape and dtype, so the copy gets it unpacked. No product reads it,
    # except the layer's own.
    params = {**own, "kernel": kernel.unpack() if packed else kernel}
    return copy.apply({"params": params}, *args, method=base.__call__, **kwargs)


def _product(
    layer: nn.Module, base: type[nn.Module], kernel: Any, implementation: Implementation
) -> dict[str, Any]:
    """The field that replaces a layer's product; nothing if the layer has its own."""
    if not is_packed(kernel):
        return {"conv_general_dilated": _grouped_conv}
    if has_own_product(layer, base):
        return {}
    if issubclass(base, _DENSE):
        multiply = partial(packed_dot_general, implementation=implementation)
        return {"dot_general": _with_packed(multiply, kernel)}
    convolve = partial(packed_conv_general, implementation=implementation)
    return {"conv_general_dilated": _with_packed(convolve, kernel)}


def _is_grouped(layer: nn.Module) -> bool:
    """Whether it is a convolution with groups and without a product function of its own."""
    return (
        isinstance(layer, nn.Conv)
        and layer.feature_group_count > 1
        and layer.conv_general_dilated is None
        and layer.conv_general_dilated_cls is None
    )


def _with_packed(product: Callable[..., jax.Array], packed: Packed) -> Callable[..., jax.Array]:
    """A product function for Flax, which multiplies by the packed weight instead of its own."""

    def multiply(x: jax.Array, w: jax.Array, *args: Any, **settings: Any) -> jax.Array:
        # Flax casts kernel and input to its compute dtype first; only `w` got the cast.
        return product(x, packed.astype(w.dtype), *args, **settings)

    return multiply


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

"""Layers of NNX that multiply by packed kernels, and reasons why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from nmjax.kernels.layer_products import (
    packed_conv_general,
    packed_dot_general,
    packed_einsum,
    summed_axes,
)
from nmjax.layouts.axes import Axes
from nmjax.nnx.variables import named_variables
from nmjax.packed.weight import Packed, is_packed
from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.modules import is_quantized

# Their kernels can be packed. nnx.MultiHeadAttention, the recurrent cells and nnx.LoRALinear are
# made of these layers.
LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.Einsum)

# These compute a layer's weights from others, before each call.
_REWRITING = (nnx.WeightNorm, nnx.SpectralNorm)


# Functions of a variable that Flax calls at each use. Those of creation have already run.
_HOOKS = ("on_get_value", "on_set_value", "on_add_axis", "on_remove_axis")
_METHODS = ("get_value", "set_value")

# Metadata that belongs to one variable, or to an array with the axes of the dense weight.
_SHARDING = ("out_sharding", "sharding", "sharding_names", "sharding_rules", "mesh")
_DENSE_METADATA = {"hijax", "ref", "eager_sharding", "on_create_value", *_HOOKS, *_SHARDING}


class PackedParam(nnx.Param):
    """A parameter that holds a packed weight, for the layers that can multiply by it."""

    @classmethod
    def in_place_of(cls, dense: Any, packed: Packed) -> PackedParam:
        """The packed form of a dense parameter, with its metadata except for its sharding."""
        metadata = dense.get_metadata().items()
        return cls(packed, **{key: x for key, x in metadata if key not in _DENSE_METADATA})

    def get_value(self, *, index: Any = ...) -> Any:
        """The packed weight. `kernel[...]` reads all of it, and parts cannot be read."""
        if index is not ...:
            raise TypeError(f"a packed weight cannot be indexed by {index!r}; unpack it first")
        return super().get_value()

    def __jax_array__(self) -> Any:
        raise TypeError(
            f"a packed weight of shape {self.shape} is not an array: only nnx.Linear, "
            "nnx.LinearGeneral, nnx.Conv and nnx.Einsum multiply by it. "
            "`parameter.get_value().unpack()` gives the array"
        )


def use_packed_products(layer: Any) -> None:
    """Makes a layer multiply by a packed kernel; a dense kernel still works."""
    layer.promote_dtype = promote_dtype
    if isinstance(layer, nnx.Conv):
        layer.conv_general_dilated = conv_general_dilated
    elif isinstance(layer, nnx.Einsum):
        layer.einsum_op = einsum
    else:
        layer.dot_general = dot_general


def check_layers(model: nnx.Module, plans: Mapping[str, LeafPlan]) -> None:
    """Raises TypeError unless the layers of all planned parameters can multiply by them packed."""
    _check_not_quantized(model)
    variables = named_variables(nnx.state(model, nnx.Param))
    rewriting = _rewritten_by(model)
    obstacles: dict[str, str] = {}
    found = holders(model, plans)
    held = {name for *_, name in found}
    for name in plans.keys() & variables.keys():
        if hook := _hook(variables[name]):
            obstacles[name] = f"its variable has its own {hook}, which packed weights ignore"
        elif id(variables[name]) in rewriting:
            obstacles[name] = (
                f"{rewriting[id(variables[name])]} computes it from other variables in each call"
            )
        elif name not in held:
            obstacles[name] = "it is not an attribute of a layer"
    for layer, attribute, name in found:
        if reason := _obstacle(layer, attribute, plans[name]):
            obstacles.setdefault(name, reason)
    if obstacles:
        raise TypeError(
            "these parameters cannot be packed:\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in sorted(obstacles.items()))
            + "\nLeave them out of the plan (exclude=)."
        )


def holders(model: nnx.Module, names: Collection[str]) -> list[tuple[Any, str, str]]:
    """The modules that hold the named parameters: (module, attribute, name of the parameter)."""
    named = {id(x): name for name, x in named_variables(nnx.state(model)).items() if name in names}
    return [
        (node, attribute, named[id(value)])
        for _, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        for attribute, value in vars(node).items()
        if id(value) in named
    ]


def _check_not_quantized(model: nnx.Module) -> None:
    """Raises TypeError if qwix has replaced the products of a module."""
    for _, node in nnx.iter_graph(model):
        if is_quantized(node):
            raise TypeError(
                f"{type(node).__name__} is quantized by qwix, and packed products would not be: "
                "pack the module before qwix.quantize_model, or leave the quantized one pruned"
            )


def _obstacle(layer: Any, name: str, leaf_plan: LeafPlan) -> str:
    """Why a layer cannot multiply by its packed parameter; empty if it can."""
    if not isinstance(layer, LAYERS) or name != "kernel":
        return (
            f"it is the {name!r} of {type(layer).__name__}, and only the kernels of nnx.Linear, "
            "nnx.LinearGeneral, nnx.Conv and nnx.Einsum can be packed"
        )
    for argument, ordinary in _products(layer).items():
        if getattr(layer, argument) not in ordinary:
            return f"{type(layer).__name__} has its own {argument}, which packed weights ignore"
    reduction = _reduction_axes(layer)
    if reduction is None:
        return ""
    taps = tuple(range(-2 - len(layer.kernel_size), -2)) if isinstance(layer, nnx.Conv) else ()
    placed = leaf_plan.pattern.place(Axes(reduction, leaf_plan.output_axes, taps)).reduction
    if set(placed) != set(leaf_plan.reduction_axes):
        return (
            f"it is planned along {leaf_plan.reduction_axes}, but {type(layer).__name__} sums over "
            f"{placed}; a stack of layers must be along the first axis"
        )
    return ""


def _hook(variable: Any) -> str:
    """The name of a function that a variable calls when its value is used; empty if it has none."""
    if isinstance(variable, PackedParam):
        return ""
    metadata, kind = variable.get_metadata(), type(variable)
    own = [name for name in _HOOKS if metadata.get(name)]
    own += [name for name in _METHODS if getattr(kind, name) is not getattr(nnx.Variable, name)]
    return own[0] if own else ""


def _rewritten_by(model: Any) -> dict[int, str]:
    """Identity of each variable below a layer that computes weights -> name of that class."""
    return {
        id(variable): type(node).__name__
        for _, node in nnx.iter_graph(model)
        if isinstance(node, _REWRITING)
        for _, variable in nnx.iter_graph(node)
        if isinstance(variable, nnx.Param)
    }


# The functions below replace a layer's own. They are module-level functions, because NNX compares
# a module's attributes to decide whether it must compile again.


def promote_dtype(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Flax's `promote_dtype`, which also casts the values of packed weights."""
    # Of a packed weight only its dtype counts, which may not be that of its values.
    arrays = tuple(jnp.zeros((), x.dtype) if is_packed(x) else x for x in args)
    promoted = dtypes.promote_dtype(arrays, dtype=dtype, inexact=inexact)
    return tuple(
        x.astype(array.dtype) if is_packed(x) else array
        for x, array in zip(args, promoted, strict=True)
    )


def dot_general(x: Any, w: Any, *args: Any, **settings: Any) -> Any:
    """`lax.dot_general`, which also takes a packed weight."""
    product = packed_dot_general if is_packed(w) else lax.dot_general
    return product(x, w, *args, **settings)


def conv_general_dilated(x: Any, w: Any, *args: Any, **settings: Any) -> Any:
    """`lax.conv_general_dilated`, which also takes a packed kernel."""
    product = packed_conv_general if is_packed(w) else lax.conv_general_dilated
    return product(x, w, *args, **settings)


def einsum(subscripts: str, x: Any, w: Any, **settings: Any) -> Any:
    """`jnp.einsum`, which also takes a packed weight."""
    product = packed_einsum if is_packed(w) else jnp.einsum
    return product(subscripts, x, w, **settings)


def _products(layer: Any) -> dict[str, tuple[Any, ...]]:
    """The layer's arguments that packed products replace -> the values that they stand for."""
    both: dict[str, tuple[Any, ...]] = {"promote_dtype": (dtypes.promote_dtype, promote_dtype)}
    if isinstance(layer, nnx.Conv):
        # A mask is an array, which `in` would compare entry by entry.
        own = "mask" if layer.mask is not None else "conv_general_dilated"
        return both | {own: (lax.conv_general_dilated, conv_general_dilated)}
    if isinstance(layer, nnx.Einsum):
        return both | {"einsum_op": (jnp.einsum, einsum)}
    ordinary: tuple[Callable[..., Any] | None, ...] = (lax.dot_general, dot_general)
    if isinstance(layer, nnx.Linear):
        return both | {"dot_general": ordinary}
    return both | {"dot_general": (None, *ordinary), "dot_general_cls": (None,)}


def _reduction_axes(layer: Any) -> tuple[int, ...] | None:
    """The kernel's axes that a layer sums over; None if each call of the layer says so."""
    if isinstance(layer, nnx.Einsum):
        return None if layer.einsum_str is None else summed_axes(layer.einsum_str)
    if isinstance(layer, nnx.LinearGeneral):
        outputs = len(layer.out_features)
        return tuple(range(-outputs - len(layer.in_features), -outputs))
    return (-2,)

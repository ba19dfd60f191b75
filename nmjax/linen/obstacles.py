"""What keeps a linen module from running on packed weights. Each error names the leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.errors
import flax.linen as nn
from flax.core import meta

from nmjax.packed.weight import Packed, is_packed
from nmjax.trees.leaves import named_leaves
from nmjax.trees.modules import is_quantized

_WAY_OUT = "Leave this leaf out of the plan (exclude=), or unpack it (nmjax.unpack)."

# Factories of products. What they make may have variables and random numbers of its own, which a
# copy of the layer cannot reach.
_FACTORIES = ("dot_general_cls", "conv_general_dilated_cls")
_PRODUCTS = ("dot_general", "conv_general_dilated")
# What Flax applies to the kernel before the product.
_CHANGES = ("mask", "promote_dtype")


def check_stacks(variables: Any) -> None:
    """Raises ValueError if a packed leaf holds layers along an axis that is not in front."""
    params = variables.get("params", {}) if isinstance(variables, Mapping) else {}
    for name, leaf in named_leaves(params, is_leaf=is_packed).items():
        if not is_packed(leaf):
            continue
        plan = leaf.leaf_plan
        used = {*plan.reduction_axes, *plan.output_axes, *plan.tap_axes}
        stack = [axis for axis in range(len(plan.shape)) if axis - len(plan.shape) not in used]
        if stack != list(range(len(stack))):
            raise ValueError(
                f"{name} {plan.shape}: its layers are stacked along axis {stack[-1]}, but packed "
                "arrays hold the layers in front. Stack them along axis 0 "
                f'(variable_axes={{"params": 0}}). {_WAY_OUT}'
            )


def check_unchanged(layer: nn.Module) -> None:
    """Raises TypeError if a module changes packed weights, or products, before a layer uses them.

    Args:
      layer: a bound module.
    """
    if isinstance(layer, (nn.WeightNorm, nn.SpectralNorm)):
        what, inner = "normalizes weights", layer.layer_instance
    elif is_quantized(layer):
        what, inner = "is quantized by qwix, which replaces products", layer
    else:
        return
    if inner.scope is None:
        return
    params = inner.scope.variables().get("params", {})
    packed = [n for n, leaf in named_leaves(params, is_leaf=is_packed).items() if is_packed(leaf)]
    if packed:
        names = ", ".join("/".join((*inner.path, name)) for name in packed)
        raise TypeError(f"{names}: {_named(layer)} {what}, which needs dense weights. {_WAY_OUT}")


def check_layer(layer: nn.Module, kernel: Packed) -> None:
    """Raises TypeError if a layer cannot use its packed kernel as its settings say.

    Args:
      layer: a bound Dense, DenseGeneral or Conv layer.
      kernel: its kernel.
    """
    what = ""
    # Flax writes the transformations around a module into this path: "map_variables(Dense_0)".
    if any("map_variables(" in part for part in layer.scope.debug_path):  # type: ignore[union-attr]
        what = "is inside nn.map_variables, which changes weights"
    for name in _FACTORIES:
        if getattr(layer, name, None) is not None:
            what = f"has its own {name}, whose variables packed_apply cannot provide"
    for name in _PRODUCTS:
        if isinstance(getattr(layer, name, None), nn.Module):
            what = f"has a module as its {name}, whose variables packed_apply cannot provide"
    if what:
        raise TypeError(f"{_leaf(layer)} {kernel.shape}: {_named(layer)} {what}. {_WAY_OUT}")


def has_own_product(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a layer's product, or what it multiplies by, differs from Flax's.

    Args:
      layer: a layer that `check_layer` accepts.
      base: Flax's class of the layer.
    """
    fields = base.__dataclass_fields__
    return any(
        getattr(layer, name) is not fields[name].default
        for name in (*_PRODUCTS, *_CHANGES)
        if name in fields
    )


def is_shared(module: nn.Module, layers: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module shares its variables with one of these layers, by `nn.share_scope`."""
    children = module._state.children.values()
    return any(isinstance(c, layers) and c.scope is module.scope for c in children)


def no_product(layer: nn.Module, names: list[str]) -> TypeError:
    """The error for a module whose products cannot be replaced."""
    return TypeError(
        f"{_named(layer)} has packed leaves {names}, but only the kernels of nn.Dense, "
        "nn.DenseGeneral and nn.Conv can be packed. Leave these leaves out of the plan (exclude=), "
        "or unpack them"
    )


def reads_kernel(layer: nn.Module, error: flax.errors.ScopeParamShapeError) -> Exception:
    """The error for a subclass of a layer whose own code declares the packed kernel."""
    if f'"kernel" in "{layer.scope.path_text}"' not in str(error):  # type: ignore[union-attr]
        return error
    return TypeError(
        f"{_leaf(layer)}: {_named(layer)} reads its kernel itself, not through the __call__ of the "
        f"Flax layer that it derives from. {_WAY_OUT}"
    )


def own_params(module: nn.Module) -> dict[str, Any]:
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


def _leaf(layer: nn.Module) -> str:
    return "/".join((*layer.path, "kernel"))


def _named(module: nn.Module) -> str:
    return f"{type(module).__name__} at {'/'.join(module.path) or 'the root'}"

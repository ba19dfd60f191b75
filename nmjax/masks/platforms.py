"""Masks that TPUs compute in their own way: one JAX primitive, lowered by platform.

The platform is known when a program is lowered, not when it is traced. A primitive with a rule for
each platform traces in one step and leaves nothing of the TPU's kernel in other programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config  # JAX has no public name for what this module needs of it.
from jax.interpreters import ad, batching, mlir, xla

# `jax.extend.core.Primitive`, without importing `jax.extend`: that also loads Pallas, which takes
# half a second.
Primitive: Any = type(lax.add_p)


def keep_primitive(
    name: str,
    by_xla: Callable[..., jax.Array],
    by_tpu: Callable[..., jax.Array],
    tpu_takes: Callable[..., bool],
) -> Any:
    """A primitive that keeps the highest of every m consecutive values.

    Its parameters are `n`, `m`, `stride`, negative `axes`, `to_keys`, and `as_mask`: whether it
    returns the mask, or the values with zeros for those not kept.

    Args:
      name: as it appears in a jaxpr.
      by_xla: takes the values and the parameters; what platforms without a kernel run.
      by_tpu: the same, with a kernel that sees the values of one device.
      tpu_takes: whether `by_tpu` takes a shape, a dtype, and the parameters.
    """
    primitive = Primitive(name)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(_shape)
    # The axes are negative, so one more axis in front changes nothing.
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    ad.primitive_jvps[primitive] = functools.partial(_derivative, primitive)
    plain = mlir.lower_fun(by_xla, multiple_results=False)
    mlir.register_lowering(primitive, plain)
    for_tpu = functools.partial(_lower_for_tpu, plain, by_tpu, tpu_takes)
    mlir.register_lowering(primitive, for_tpu, platform="tpu")
    return primitive


def _batch(primitive: Any, values: Any, dims: Any, **rule: Any) -> tuple[jax.Array, int]:
    return primitive.bind(jnp.moveaxis(values[0], dims[0], 0), **rule), 0


def _derivative(primitive: Any, values: Any, tangents: Any, **rule: Any) -> Any:
    """What is kept passes its tangent on. Masks have none: `nm_mask` stops gradients."""
    mask = primitive.bind(*values, **{**rule, "as_mask": True})
    (tangent,) = tangents
    return primitive.bind(*values, **rule), jnp.where(mask, tangent, jnp.zeros_like(tangent))


def _shape(values: Any, *, as_mask: bool, **rule: Any) -> Any:
    del rule
    return values.update(dtype=bool, weak_type=False) if as_mask else values


def _lower_for_tpu(
    plain: Callable[..., Any],
    by_tpu: Callable[..., jax.Array],
    tpu_takes: Callable[..., bool],
    ctx: Any,
    values: Any,
    **rule: Any,
) -> Sequence[Any]:
    """Lowers to the kernel if it takes these values, and otherwise as on other platforms."""
    (source,), (result,) = ctx.avals_in, ctx.avals_out
    if not tpu_takes(source.shape, source.dtype, **rule):
        return plain(ctx, values, **rule)
    if _is_whole(ctx.module_context.axis_context):
        # A kernel sees one device's values and nothing of mesh axes.
        ctx = ctx.replace(avals_in=[_bare(source)], avals_out=[_bare(result)])
        keep = functools.partial(by_tpu, **rule)
    elif (manual := _axes_to_take_apart(source.sharding)) is not None:
        spec = source.sharding.spec
        keep = jax.shard_map(
            functools.partial(by_tpu, **rule),
            mesh=source.sharding.mesh,
            in_specs=spec,
            out_specs=spec,
            axis_names=manual,
            check_vma=False,
        )
    else:  # XLA has yet to choose the sharding, and cannot partition a kernel.
        return plain(ctx, values, **rule)
    with config._check_vma(False):
        return mlir.lower_fun(keep, multiple_results=False)(ctx, values)


def _axes_to_take_apart(sharding: Any) -> set[str] | None:
    """The explicit axes of a mesh, or None if the compiler chooses along another of its axes."""
    mesh = sharding.mesh
    rest = set(mesh.axis_names) - set(mesh.manual_axes)
    return rest if rest and rest == set(mesh.explicit_axes) else None


def _is_whole(context: Any) -> bool:
    """Whether a device computes on arrays as the program has them: nothing is left to partition."""
    if hasattr(context, "manual_axes"):
        manual = set(context.manual_axes) | set(context.mesh.manual_axes)
        return manual == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


def _bare(aval: Any) -> Any:
    return jax.core.ShapedArray(aval.shape, aval.dtype)

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
import numpy as np
from jax import lax
from jax._src import config  # JAX has no public name for what this module needs of it.
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec

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

    Its parameters are `n`, `m`, `stride`, negative `axes`, `to_keys`, and `out`: bool for the mask,
    or the dtype of the values with zeros for those not kept.

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


def on_shards(
    keep: Callable[..., jax.Array], w: Any, sharding: Any, axes: Sequence[int], *, out: np.dtype
) -> jax.Array:
    """`keep(w, out=out)`; programs for TPUs compute it shard by shard.

    With automatic mesh axes, a program does not show how `w` lies, and XLA cannot partition a
    kernel. So the caller says how it lies.

    Args:
      keep: hashable; returns the mask of `w`, or `w` with zeros for what is not kept, of the dtype
        `out`. Shards of `w` hold whole groups and blocks.
      w: weights.
      sharding: of the last axes of `w`, over an abstract mesh; further axes in front are not split.
      axes: negative axes along which groups and blocks extend, for those who read the program.
      out: bool for the mask, or the dtype of the values.
    """
    rule = {"keep": keep, "sharding": sharding, "axes": tuple(axes)}
    kept: jax.Array = _on_shards_p.bind(w, **rule, out=out)
    return kept


def _lower_on_shards(
    ctx: Any,
    values: Any,
    *,
    keep: Callable[..., jax.Array],
    sharding: Any,
    out: np.dtype,
    **rule: Any,
) -> Sequence[Any]:
    del rule
    keep = functools.partial(keep, out=out)
    if _is_partitioned_over(sharding.mesh, ctx.module_context.axis_context):
        ndim = ctx.avals_in[0].ndim
        spec = PartitionSpec(*((None,) * ndim + tuple(sharding.spec))[-ndim:])
        keep = jax.shard_map(
            keep, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    return mlir.lower_fun(keep, multiple_results=False)(ctx, values)


def _is_partitioned_over(mesh: Any, context: Any) -> bool:
    """Whether XLA partitions the program over this mesh, or one that looks the same to it."""
    if getattr(context, "num_devices", None) != mesh.size:
        return False
    known = jax.sharding.get_abstract_mesh()
    return known.empty or known == mesh


def _batch(primitive: Any, values: Any, dims: Any, **rule: Any) -> tuple[jax.Array, int]:
    return primitive.bind(jnp.moveaxis(values[0], dims[0], 0), **rule), 0


def _derivative(primitive: Any, values: Any, tangents: Any, **rule: Any) -> Any:
    """What is kept passes its tangent on. Masks have none: `nm_mask` stops gradients."""
    mask = primitive.bind(*values, **{**rule, "out": np.dtype(bool)})
    (tangent,) = tangents
    kept = jnp.where(mask, tangent, jnp.zeros_like(tangent)).astype(rule["out"])
    return primitive.bind(*values, **rule), kept


def _shape(values: Any, *, out: np.dtype, **rule: Any) -> Any:
    del rule
    return values if values.dtype == out else values.update(dtype=out, weak_type=False)


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
    if is_whole(ctx.module_context.axis_context):
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


def is_whole(context: Any) -> bool:
    """Whether a device computes on arrays as the program has them: nothing is left to partition."""
    if hasattr(context, "manual_axes"):
        manual = set(context.manual_axes) | set(context.mesh.manual_axes)
        return manual == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


def _bare(aval: Any) -> Any:
    return jax.core.ShapedArray(aval.shape, aval.dtype)


_on_shards_p = Primitive("nm_keep_on_shards")
_on_shards_p.def_impl(functools.partial(xla.apply_primitive, _on_shards_p))
_on_shards_p.def_abstract_eval(_shape)
batching.primitive_batchers[_on_shards_p] = functools.partial(_batch, _on_shards_p)
ad.primitive_jvps[_on_shards_p] = functools.partial(_derivative, _on_shards_p)
mlir.register_lowering(
    _on_shards_p,
    mlir.lower_fun(lambda w, *, keep, out, **rule: keep(w, out=out), multiple_results=False),
)
mlir.register_lowering(_on_shards_p, _lower_on_shards, platform="tpu")
